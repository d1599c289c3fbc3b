"""`parallel:` in the job file: how a global batch is spread over workers and memory. Runs anywhere.

Nothing here changes the loss curve.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from launcher.spec.base import Section


class ParallelSpec(Section):
    """`parallel:` How a global batch is spread over workers and memory."""

    zero: Literal["auto", 0, 1, 2, 3] = "auto"
    """DeepSpeed ZeRO stage: 1 shards optimizer states, 2 also gradients, 3 also weights (arXiv:1910.02054). 0 and 1
    exchange gradients once a step, and train the same bits on any number of workers; 2 and 3 after every part of a
    batch. `auto` chooses the lowest stage that fits into a worker's memory, or into 8 GiB where that is not known, and
    then at most 2; 0 for adafactor, 3 to offload weights."""

    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    """Samples per worker in one forward pass. Null uses the whole local batch (the worker's part of the global batch);
    `auto` chooses the largest of local batch, half of it, a quarter ... that fits into memory."""

    offload_optimizer: bool = False
    """Keep optimizer states in CPU memory and update the weights there (ZeRO 1 to 3). Compiles a CPU kernel at first
    use."""

    offload_path: str | None = None
    """Directory on an NVMe disk of each node for offloaded optimizer states, instead of CPU memory (ZeRO 3). Needs
    libaio and compiles a kernel at first use."""

    offload_parameters: bool = False
    """Keep weights in CPU memory between uses (ZeRO 3)."""

    activation_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them: less memory, about a third more compute."""

    @model_validator(mode="after")
    def _check_offload(self) -> "ParallelSpec":
        # `auto` becomes 3 in this case (`JobSpec.zero_stage`).
        if self.offload_parameters and self.zero not in ("auto", 3):
            raise ValueError(
                f"offload_parameters needs zero: 3, not {self.zero}; set zero: 3 or drop offload_parameters"
            )
        if self.offload_optimizer and self.zero == 0:
            raise ValueError("offload_optimizer needs zero: 1, 2 or 3, not 0; raise zero or drop offload_optimizer")
        return self

    @model_validator(mode="after")
    def _check_offload_path(self) -> "ParallelSpec":
        if self.offload_path is None:
            return self
        if not self.offload_optimizer:
            raise ValueError(
                "offload_path is for offloaded optimizer states, and offload_optimizer is false; set "
                "offload_optimizer: true or drop offload_path"
            )
        if self.zero not in ("auto", 3):
            raise ValueError(f"offload_path needs zero: 3, not {self.zero}; set zero: 3 or drop offload_path")
        if not self.offload_path.startswith("/"):
            raise ValueError(
                f"offload_path is {self.offload_path}, which is not an absolute path; give a directory on a local disk "
                "of every node (/mnt/nvme)"
            )
        return self
