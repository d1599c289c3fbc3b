"""Writes an encoder-decoder of an encoder twice, to `data/minilm-twice/` or `data/e5-twice/`. Runs once.

The decoder has the encoder's weights too; its attention to the encoder is new and drawn from a fixed seed, so that
every training begins with the same model. Gets the encoder first, if it is not there yet.
"""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
# Directory -> that of the encoder, and the script that gets it.
ENCODERS = {
    "minilm-twice": ("quickstart/model", ROOT / "jobs" / "quickstart" / "prepare.py"),
    "e5-twice": ("e5", Path(__file__).with_name("prepare_e5.py")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=ENCODERS)
    name = parser.parse_args().model
    folder = ROOT / "data" / name
    if folder.exists():
        return
    encoder, prepare = ENCODERS[name]
    subprocess.run([sys.executable, str(prepare)], check=True)

    from transformers import AutoTokenizer, EncoderDecoderModel, set_seed

    set_seed(0)
    source = str(ROOT / "data" / encoder)
    model = EncoderDecoderModel.from_encoder_decoder_pretrained(source, source, encoder_add_pooling_layer=False)
    tokenizer = AutoTokenizer.from_pretrained(source)
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id = tokenizer.cls_token_id
        config.eos_token_id = tokenizer.sep_token_id
        config.pad_token_id = tokenizer.pad_token_id
    unfinished = folder.with_suffix(".tmp")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)


if __name__ == "__main__":
    main()
