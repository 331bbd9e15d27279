"""Record the reference losses of a small preset, from two runs with two seeds, as recipes/references/NAME.yaml.

`mimkit doctor --run DIR` compares runs with these references.

python recipes/mae_hivit.py --config mae_hivit_small --seed 0 --out runs/0
python recipes/mae_hivit.py --config mae_hivit_small --seed 1 --out runs/1
python benchmarks/loss_bands.py --name mae_hivit_small --first runs/0 --second runs/1
"""

import sys
from pathlib import Path

import yaml

from mimkit.config import call
from mimkit.doctor.loss_bands import BY_CHANCE, FRACTIONS, losses, tolerance
from mimkit.errors import UserError, cli_entry
from mimkit.files import read_metrics


def record(name: str, first: str, second: str) -> None:
    """Write the reference losses of two runs.

    Args:
        name: Preset of both runs.
        first: Directory of the first run.
        second: Directory of the second run.
    """
    runs, options = [], []
    for folder in map(Path, (first, second)):
        config = yaml.safe_load((folder / "config.yaml").read_text())
        options.append({key: value for key, value in config.items() if key not in BY_CHANCE})
        lines = [line for line in read_metrics(folder) if "loss" in line]
        runs.append(losses(lines, lines[-1]["step"] / lines[-1]["epoch"] * config["epochs"]))
    if options[0] != options[1]:
        raise UserError(f"{first} and {second} differ in more options than their seed: pass runs of the same options.")
    loss = {fraction: [round(run[fraction], 4) for run in runs] for fraction in FRACTIONS}
    recipe = "mae_hivit" if name == "mae_hivit_small" else name.split("_")[0]
    text = f"# python recipes/{recipe}.py --config {name} --seed 0, and 1; "
    text += f"python benchmarks/loss_bands.py --name {name}\n"
    text += yaml.safe_dump({"loss": loss, "tolerance": round(tolerance(loss), 4)}, sort_keys=False)
    text += yaml.safe_dump({"options": options[0]}, sort_keys=False)
    file = Path(__file__).parent.parent / "recipes" / "references" / f"{name}.yaml"
    file.write_text(text)
    print(f"wrote {file}: within {tolerance(loss):.1%}")


if __name__ == "__main__":
    cli_entry(call)(record, "loss_bands.py", sys.argv[1:])
