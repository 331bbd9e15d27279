"""Write the encoder and the decoder of a pre-training run, in the form that timm and mimkit load."""

from mimkit.data.transforms import Normalize
from mimkit.methods.checkpoint import save_method
from mimkit.methods.protocols import Method
from mimkit.training.run import Run


def export_pretrained(run: Run, method: Method, size: tuple[int, int], normalize: Normalize) -> None:
    """Write encoder/ and decoder/ into the run's directory. All processes must call this.

    Args:
        size, normalize: the encoder's input.
    """
    method = run.engine.full_state(method)
    if run.engine.is_main:
        save_method(method, run.folder, size, *normalize.values)
    run.engine.wait()
