"""CUDA graphs on a GPU: captured steps are eager steps to the last bit; what cannot be captured is named."""

import re
import subprocess
import sys
import textwrap

import pytest
import training
from unit.training.cuda.test_graphs import trained

from titan_cpt.training.cuda.graphs import CapturedStep

pytestmark = [pytest.mark.gpu, *training.THEIR_WARNINGS_IGNORED]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("local_batch", "compiled"), [(4, False), (1, False), (2, True)])
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # raised inside torch's compiler
def test_captured_steps_are_eager_steps_to_the_last_bit(tmp_path, precision, local_batch, compiled):
    """With validation between the steps. The eager side has the same kernels, so its LR is in device memory as well.

    The attention kernel is math, whose backward pass adds in a fixed order.
    """
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path)
    raw = training.changed(raw, compile={"enable": compiled})
    raw["training"] |= {"mixed_precision_param": precision, "local_batch_size": local_batch, "cuda_graphs": True}
    raw["training"]["attention_backend"] = "math"
    with training.built_trainer(training.config_of(raw)) as trainer:
        assert isinstance(trainer.stepper, CapturedStep)
        captured, weights = trained(trainer)
        trainer.stepper.graphs = EagerGraphs()
        eager, same = trained(trainer)

    assert captured == eager
    assert training.same_bits(weights, same)


class EagerGraphs:
    """Captures nothing: a replay does the work."""

    def run(self, work):
        """Do the work."""
        work()

    def capture(self, work):
        """The work itself."""
        return work

    def release(self):
        """Nothing to free."""


def test_what_cannot_be_captured_is_an_error_that_names_the_key_and_the_cause():
    """An operation that copies a number to the host. In a process of its own: a broken capture leaves torch's allocator
    and current stream as they were within it.
    """
    program = textwrap.dedent("""
        import torch
        from titan_cpt.errors import ConfigError
        from titan_cpt.training.cuda.graphs import CudaGraphs
        device = torch.device("cuda", 0)
        number = torch.ones((), device=device)
        try:
            CudaGraphs(device).capture(lambda: number.item())
        except ConfigError as error:
            print(error)
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)

    assert re.search(r"training\.cuda_graphs: .*cannot be captured: .*not permitted.*Remove the key", done.stdout), done
