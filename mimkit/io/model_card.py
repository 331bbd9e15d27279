"""Lay out a run or a model folder for the hub: a network at the root, and a model card with the run's own figures."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mimkit.errors import UserError
from mimkit.files import read_json, read_metrics, read_options
from mimkit.io.hub import DENSE, WEIGHTS
from mimkit.io.weights import check_finite, read_weights, without_repeated_classes

PARTS = ("encoder", "best", "last")  # folders of a run that hold a network
SELECTED_BY = ("top1", "miou", "box_ap")  # metrics that decide which weights become best/
LOCAL_OPTIONS = ("out", "resume", "workers", "track")  # options about the machine, which the card leaves out
HIDDEN_METRICS = ("step", "epoch", "lr", "images_per_s", "waiting")
TASKS = {  # the hub's name of the task, and the description in the card
    "encoder": ("image-feature-extraction", "a network for features"),
    "classifier": ("image-classification", "a classifier"),
    "segmenter": ("image-segmentation", "a segmenter"),
    "detector": ("object-detection", "a detector"),
}


class Pushable(NamedTuple):
    """A network that can be pushed to the hub."""

    folder: Path  # with the network
    run: Path | None  # that the network belongs to
    config: dict[str, Any]
    task: str  # a key of TASKS


def find_pushable(source: str) -> Pushable:
    """Find the network to push in a run, in a part of a run, or in a model folder.

    Raises:
        UserError: there is no network.
    """
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
    return Pushable(folder, run, config, task)


def final_metrics(found: Pushable) -> list[tuple[str, float, float]]:
    """Return (name, value, step) of each metric, as logged last at or before the step of the weights to push."""
    lines = read_metrics(found.run) if found.run else []
    end = math.inf
    if found.folder.resolve().name == "best":
        candidates = [(line[name], line["step"]) for line in lines for name in SELECTED_BY if name in line]
        end = max(candidates, key=lambda pair: pair[0])[1] if candidates else end
    latest: dict[str, tuple[float, float]] = {}
    for line in lines:
        if line["step"] <= end:
            latest |= {name: (value, line["step"]) for name, value in line.items()}
    return [
        (name, value, step)
        for name, (value, step) in latest.items()
        if name not in HIDDEN_METRICS and not name.endswith("_raw") and math.isfinite(value)
    ]


def without_local_paths(value: Any) -> Any:
    """Replace each path on this machine in a nested value by its last component, so that no folder is published."""
    if isinstance(value, dict):
        return {key: without_local_paths(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_local_paths(each) for each in value]
    if not isinstance(value, str) or not re.search(r"[\\/~]", value):
        return value
    home = Path.home().name or "home"
    parts = re.split(r"[\\/]", value.rstrip("\\/"))
    local = re.match(r"(local-dir:)?\s*([\\/~]|\.\.|[A-Za-z]:[\\/])", value) or home in parts[:-1]
    return value if not local else parts[-1] if parts[-1] not in ("", "~", "..", home) else "a local folder"


def model_card(found: Pushable, to: str) -> str:
    """Return the text of the repository's README.md.

    Args:
        to: repository, OWNER/NAME.
    """
    report = _report(found.folder)
    dense, config = found.task in ("segmenter", "detector"), found.config
    pipeline, description = TASKS[found.task]
    license = (config.get("pretrained_cfg") or {}).get("license")
    header = {"library_name": "mimkit" if dense else "timm", "pipeline_tag": pipeline, "tags": ["mimkit", pipeline]}
    header |= {"license": license} if license else {}
    state = read_weights(found.folder)
    check_finite(state, found.folder)
    millions = sum(tensor.numel() for tensor in state.values()) / 1e6
    name = config.get("backbone") or config.get("architecture")
    origin = "made by mimkit"
    if (found.folder.parent / "decoder").is_dir() and found.task == "encoder" and found.run:
        origin = "pre-trained by masked image modeling with mimkit; the decoder is in `decoder/`"
    elif report:
        origin = f"converted from {without_local_paths(report.get('source', 'another network'))} by `mimkit convert`"
    elif found.run:
        origin = "trained with mimkit"
    text = ["---", yaml.safe_dump(header, sort_keys=False).strip(), "---", f"# {to.split('/')[1]}", ""]
    text += [f"{name} is {description}, {origin}. Its weights hold {millions:.2f} M values.", "", "## Use", ""]
    if not dense:
        text += ["```python", "import timm", "import mimkit  # registers its networks with timm", ""]
        text += [f'model = timm.create_model("hf-hub:{to}", pretrained=True)', "```", ""]
    command = f"accelerate launch recipes/finetune.py --model hf-hub:{to} --data FOLDER"
    if found.task != "encoder":
        command = f"mimkit predict --model hf-hub:{to} --images FOLDER"
    text += ["```bash", command, "```", ""]
    if metrics := final_metrics(found):
        text += ["## Figures", "", "These are from the run's metrics.jsonl. All but losses are in %.", ""]
        text += ["| | value | after step |", "|---|---|---|"]
        text += [f"| {name} | {value:.4f} | {step} |" for name, value, step in metrics] + [""]
    if report:
        text += ["## Conversion", "", "| | parameters (M) | GMACs |", "|---|---|---|"]
        text += [f"| {without_local_paths(name)} | {p:.3f} | {g:.3f} |" for name, (p, g) in report["sizes"].items()]
        text += ["", *(f"- {check['name']}: {check['result']}" for check in report["checks"] or [])]
        text += [] if report["checks"] else ["NOT CHECKED"]
        text.append("")
    pictures = [name for name in ("curves", "reconstructions") if found.run and (found.run / f"{name}.png").is_file()]
    text += [line for name in pictures for line in (f"![{name}]({name}.png)", "")]
    if found.run:
        options = {key: value for key, value in read_options(found.run).items() if value is not None}
        shown = {key: without_local_paths(value) for key, value in options.items() if key not in LOCAL_OPTIONS}
        text += ["## Options", "", "```yaml", yaml.safe_dump(shown, sort_keys=False).strip(), "```", ""]
    return "\n".join(text)


def _report(folder: Path) -> dict[str, Any] | None:
    """Return the report of the conversion that made a folder, if one did."""
    file = folder / "report.json"
    return read_json(file) if file.is_file() else None


def write_repository(found: Pushable, to: str, folder: Path) -> None:
    """Write all files of the repository to a folder. Checkpoints and pickles are never among them.

    Args:
        to: repository, OWNER/NAME.
    """
    (folder / "README.md").write_text(model_card(found, to))
    for name in ("config.json", *DENSE, "report.json"):
        if (found.folder / name).is_file():
            content = read_json(found.folder / name)
            origins = content if name == "report.json" else {"mimkit"} & content.keys()  # entries that may name paths
            content |= {key: without_local_paths(content[key]) for key in origins}
            content = without_repeated_classes(content) if name == "config.json" else content
            (folder / name).write_text(json.dumps(content, indent=2))
    shutil.copyfile(found.folder / WEIGHTS[0], folder / WEIGHTS[0])
    if not found.run:
        return
    for name in ("curves.png", "reconstructions.png"):
        if (found.run / name).is_file():
            shutil.copyfile(found.run / name, folder / name)
    if found.task == "encoder" and (found.run / "decoder").is_dir():
        (folder / "decoder").mkdir()
        for name in ("config.json", WEIGHTS[0]):
            shutil.copyfile(found.run / "decoder" / name, folder / "decoder" / name)
