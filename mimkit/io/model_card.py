"""What a run or a folder holds, laid out for the hub: a network at the root, and a card with the run's own figures."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from safetensors import safe_open

from mimkit.errors import UserError
from mimkit.files import read_json, read_metrics, read_options
from mimkit.io.hub import DENSE, WEIGHTS

PARTS = ("encoder", "best", "last")  # of a run, that hold a network
CHOSEN = ("top1", "miou", "box_ap")  # figures by which best/ was chosen
PLACES = ("out", "resume", "workers", "track")  # options of where and how, not of what
NOT_SHOWN = ("step", "epoch", "lr", "images_per_s", "waiting")
TASKS = {  # what it does: the hub's word, and ours
    "encoder": ("image-feature-extraction", "a network for features"),
    "classifier": ("image-classification", "a classifier"),
    "segmenter": ("image-segmentation", "a segmenter"),
    "detector": ("object-detection", "a detector"),
}


class Found(NamedTuple):
    """What is to be pushed."""

    folder: Path  # of the network
    run: Path | None  # that it is of
    config: dict[str, Any]
    task: str


def find_pushable(source: str) -> Found:
    """A run, a part of it, or a folder of a network."""
    root = Path(source).expanduser()
    names = ("config.json", *DENSE)
    folders = [folder for folder in (root, *(root / part for part in PARTS[:2])) if folder.is_dir()]
    folder = next((f for f in folders if any((f / name).is_file() for name in names)), None)
    if folder is None or not (folder / WEIGHTS[0]).is_file():
        raise UserError(
            f"{source} holds no network (config.json and {WEIGHTS[0]}): pass a run that has saved one, its best/ or "
            "last/, or a converted folder."
        )
    run = folder.resolve().parent if folder.resolve().name in PARTS else None
    run = run if run and (run / "config.yaml").is_file() else None
    file = next(folder / name for name in (*DENSE, "config.json") if (folder / name).is_file())
    config = read_json(file)
    task = file.stem if file.name in DENSE else "classifier" if config.get("num_classes") else "encoder"
    return Found(folder, run, config, task)


def figures(found: Found) -> list[tuple[str, float, float]]:
    """(name, value, step) of what metrics.jsonl says of the weights that are pushed, the last of each until then."""
    lines = read_metrics(found.run) if found.run else []
    end = math.inf
    if found.folder.resolve().name == "best":
        judged = [(line[name], line["step"]) for line in lines for name in CHOSEN if name in line]
        end = max(judged, key=lambda pair: pair[0])[1] if judged else end
    latest: dict[str, tuple[float, float]] = {}
    for line in lines:
        if line["step"] <= end:
            latest |= {name: (value, line["step"]) for name, value in line.items()}
    shown = {k: v for k, v in latest.items() if k not in NOT_SHOWN and not k.endswith("_raw") and math.isfinite(v[0])}
    return [(name, value, step) for name, (value, step) in shown.items()]


def private(value: Any) -> Any:
    """Without the folders of this machine: of a path, its last name alone."""
    if isinstance(value, dict):
        return {key: private(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [private(each) for each in value]
    if not isinstance(value, str) or not re.search(r"[\\/~]", value):
        return value
    home = Path.home().name or "home"
    parts = re.split(r"[\\/]", value.rstrip("\\/"))
    local = re.match(r"(local-dir:)?\s*([\\/~]|\.\.|[A-Za-z]:[\\/])", value) or home in parts[:-1]
    return value if not local else parts[-1] if parts[-1] not in ("", "~", "..", home) else "a local folder"


def model_card(found: Found, to: str) -> str:
    """The README.md of the repository."""
    report = _report(found.folder)
    dense, config = found.task in ("segmenter", "detector"), found.config
    pipeline, what = TASKS[found.task]
    license = (config.get("pretrained_cfg") or {}).get("license")
    header = {"library_name": "mimkit" if dense else "timm", "pipeline_tag": pipeline, "tags": ["mimkit", pipeline]}
    header |= {"license": license} if license else {}
    with safe_open(found.folder / WEIGHTS[0], "np") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118  it is no dict
    millions = sum(map(math.prod, shapes)) / 1e6
    name = config.get("backbone") or config.get("architecture")
    how = "made by mimkit"
    if (found.folder.parent / "decoder").is_dir() and found.task == "encoder" and found.run:
        how = "pre-trained by masked image modeling with mimkit; the decoder is in `decoder/`"
    elif report:
        how = f"converted from {private(report.get('source', 'another network'))} by `mimkit convert`"
    elif found.run:
        how = "trained with mimkit"
    text = ["---", yaml.safe_dump(header, sort_keys=False).strip(), "---", f"# {to.split('/')[1]}", ""]
    text += [f"{name} ({millions:.2f} M numbers in its weights), {what} {how}.", "", "## Use", ""]
    if not dense:
        text += ["```python", "import timm", "import mimkit  # registers its networks with timm", ""]
        text += [f'model = timm.create_model("hf-hub:{to}", pretrained=True)', "```", ""]
    command = f"accelerate launch recipes/finetune.py --model hf-hub:{to} --data FOLDER"
    if found.task != "encoder":
        command = f"mimkit predict --model hf-hub:{to} --images FOLDER"
    text += ["```bash", command, "```", ""]
    if table := figures(found):
        text += ["## Figures", "", "Of the run, from its metrics.jsonl; all but losses in %.", ""]
        text += ["| | value | after step |", "|---|---|---|"]
        text += [f"| {name} | {value:.4f} | {step} |" for name, value, step in table] + [""]
    if report:
        text += ["## Conversion", "", "| | parameters (M) | GMACs |", "|---|---|---|"]
        text += [f"| {private(name)} | {p:.3f} | {g:.3f} |" for name, (p, g) in report["sizes"].items()] + [""]
        text += [f"- {check['name']}: {check['result']}" for check in report["checks"] or []]
        text += [] if report["checks"] else ["NOT CHECKED"]
        text.append("")
    pictures = [name for name in ("curves", "reconstructions") if found.run and (found.run / f"{name}.png").is_file()]
    text += [line for name in pictures for line in (f"![{name}]({name}.png)", "")]
    if found.run:
        options = read_options(found.run)
        kept = {key: private(value) for key, value in options.items() if key not in PLACES and value is not None}
        text += ["## Options", "", "```yaml", yaml.safe_dump(kept, sort_keys=False).strip(), "```", ""]
    return "\n".join(text)


def _report(folder: Path) -> dict[str, Any] | None:
    file = folder / "report.json"
    return read_json(file) if file.is_file() else None


def lay_out(found: Found, to: str, place: Path) -> None:
    """All files of the repository into `place`: never checkpoints/, nor a pickle."""
    (place / "README.md").write_text(model_card(found, to))
    for name in ("config.json", *DENSE, "report.json"):
        if (found.folder / name).is_file():
            content = read_json(found.folder / name)
            told = content if name == "report.json" else {"mimkit"} & content.keys()  # of where it came from
            content |= {key: private(content[key]) for key in told}
            (place / name).write_text(json.dumps(content, indent=2))
    shutil.copyfile(found.folder / WEIGHTS[0], place / WEIGHTS[0])
    if not found.run:
        return
    for name in ("curves.png", "reconstructions.png"):
        if (found.run / name).is_file():
            shutil.copyfile(found.run / name, place / name)
    if found.task == "encoder" and (found.run / "decoder").is_dir():
        (place / "decoder").mkdir()
        for name in ("config.json", WEIGHTS[0]):
            shutil.copyfile(found.run / "decoder" / name, place / "decoder" / name)
