"""`parallel:` in the job file: how a batch is spread over memory; nothing here changes the curve. Runs anywhere."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from launcher.spec.base import Section


class ParallelSpec(Section):
    """How one global batch is spread over workers and memory."""

    zero: Literal["auto", 0, 1, 2, 3] = "auto"
    """DeepSpeed ZeRO stage: 1 shards optimizer states, 2 also gradients, 3 also weights (arXiv:1910.02054); `auto`
    takes the lowest that fits into a worker's memory where that is known; else 0 where one worker would shard with
    nobody and for adafactor, 3 to offload weights, else 2."""

    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    """Samples one worker puts through the model at once; null takes its whole share of the global batch, `auto` the
    largest of share, share / 2, share / 4 ... that fits into its memory."""

    offload_optimizer: bool = False
    """Keep optimizer states in CPU memory and update there (ZeRO 1 and up); compiles a CPU kernel at first use."""

    offload_path: str | None = None
    """Directory on a disk of each node, an NVMe one: offloaded optimizer states are kept in files there, not in CPU
    memory (ZeRO 3; needs libaio, and compiles a kernel at first use)."""

    offload_parameters: bool = False
    """Keep weights in CPU memory between uses (ZeRO 3)."""

    activation_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them: less memory, about a third more compute."""

    @model_validator(mode="after")
    def _offload_needs_zero(self) -> "ParallelSpec":
        if self.offload_parameters and self.zero not in ("auto", 3):
            raise ValueError(
                f"offload_parameters needs zero: 3, not {self.zero}; set zero: 3 or drop offload_parameters"
            )
        if self.offload_optimizer and self.zero == 0:
            raise ValueError("offload_optimizer needs zero: 1, 2 or 3, not 0; raise zero or drop offload_optimizer")
        return self

    @model_validator(mode="after")
    def _offload_path_is_of_use(self) -> "ParallelSpec":
        if self.offload_path is None:
            return self
        if not self.offload_optimizer:
            raise ValueError(
                "offload_path says where offloaded optimizer states are kept, and offload_optimizer is false; set "
                "offload_optimizer: true or drop offload_path"
            )
        if self.zero not in ("auto", 3):
            raise ValueError(f"offload_path needs zero: 3, not {self.zero}; set zero: 3 or drop offload_path")
        if not self.offload_path.startswith("/"):
            raise ValueError(
                f"offload_path is {self.offload_path}, which is no whole path; give a directory that every node has on "
                "a disk of its own (/mnt/nvme)"
            )
        return self
