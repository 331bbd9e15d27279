"""Starting `mimkit` costs little more than `import timm`."""

import json
import subprocess
import sys

import pytest

HEAVY = {
    "datasets",
    "accelerate",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "transformers",
    "torchmetrics",
    "segmentation_models_pytorch",
    "faster_coco_eval",
    "deepspeed",
    "pandas",
    "pyarrow",
    "tifffile",
    "rich",
    "huggingface_hub",
}
CODE = """
import json, sys
from time import process_time as now
times = [now()]
import timm
times.append(now())
by_timm = sorted(sys.modules)
import mimkit, mimkit.cli
sys.argv = ["mimkit", "--help"]
try:
    mimkit.cli.main()
except SystemExit:
    times.append(now())
print(json.dumps({"times": times, "by_timm": by_timm, "by_mimkit": sorted({*sys.modules} - {*by_timm})}))
"""


@pytest.fixture(scope="module")
def started():
    """The output of `mimkit --help` in a new process, the modules that it imports, and its CPU time."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *printed, measured = done.stdout.splitlines()
    return "\n".join(printed), json.loads(measured)


def test_the_command_imports_no_heavy_package(started):
    by_timm, by_mimkit = ({name.split(".")[0] for name in started[1][key]} for key in ("by_timm", "by_mimkit"))
    assert "mimkit" in by_mimkit
    assert (by_mimkit - by_timm) & HEAVY == set()
    assert by_timm & HEAVY <= {"huggingface_hub"}  # timm itself imports the client of the hub


def test_the_command_starts_nearly_as_fast_as_timm(started):
    begin, timm, end = started[1]["times"]
    assert end - begin < 1.1 * (timm - begin)


def test_help_lists_every_command(started):
    for name in ("models", "convert", "knn", "probe", "reconstruct", "predict", "export", "push", "doctor", "replay"):
        assert f"\n  {name} " in started[0]
