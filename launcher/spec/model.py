"""`model:` in the job file: the pretrained model to start from. Runs anywhere."""

from pydantic import Field

from launcher.spec.section import Section


class ModelSpec(Section):
    """The pretrained model and how it may be loaded."""

    name: str = Field(min_length=1)
    """Directory, or name on the Hugging Face hub, that `from_pretrained` loads."""

    revision: str | None = None
    """Commit, branch or tag on the hub; null takes the default branch."""

    trust_remote_code: bool = False
    """Allow the model repository to run its own Python code on every machine of the run."""

    allow_pickle: bool = False
    """Allow weights stored as a pickle (pytorch_model.bin), which can run code when loaded."""

    dropout: float | None = Field(default=None, ge=0.0, lt=1.0)
    """Set every dropout probability of the model's config to this; null keeps the model's own."""
