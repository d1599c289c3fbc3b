"""Writes an encoder-decoder of MiniLM twice to `data/minilm-twice/`: 49 M parameters. Runs on the client, once.

The decoder has MiniLM's weights too; its attention to the encoder is new and drawn from a fixed seed, so that every
training begins with the same model. Gets MiniLM first, if it is not there yet.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SOURCE = ROOT / "data" / "quickstart" / "model"
FOLDER = ROOT / "data" / "minilm-twice"


def main() -> None:
    if FOLDER.exists():
        return
    subprocess.run([sys.executable, str(ROOT / "jobs" / "quickstart" / "prepare.py")], check=True)

    from transformers import AutoTokenizer, EncoderDecoderModel, set_seed

    set_seed(0)
    model = EncoderDecoderModel.from_encoder_decoder_pretrained(
        str(SOURCE), str(SOURCE), encoder_add_pooling_layer=False
    )
    tokenizer = AutoTokenizer.from_pretrained(SOURCE)
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id = tokenizer.cls_token_id
        config.eos_token_id = tokenizer.sep_token_id
        config.pad_token_id = tokenizer.pad_token_id
    unfinished = FOLDER.with_suffix(".tmp")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(FOLDER)


if __name__ == "__main__":
    main()
