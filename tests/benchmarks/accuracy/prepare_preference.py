"""Writes the pairs and ratings whose prompts are short to `data/preference/{dpo,kto}/`. Runs on the client, once.

Four prompts of ten are longer than 256 tokens: of such a row TRL keeps no answer (it cuts at the end). Rows whose
prompt has at most 96 tokens are kept, so that 128 tokens hold some of every answer, and split anew: a fifth each for
validation and test, as the data's own splits have six such rows. Gets SmolLM2 first, if it is not there yet.
"""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import AutoTokenizer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
DATA = ROOT.parent / "shared" / "data" / "preference"
FOLDER = ROOT / "data" / "preference"
PROMPT_TOKENS = 96
SPLITS = ("train", "validation", "test")
# Rows in turn.
TURNS = ("validation", "test", "train", "train", "train")


def main() -> None:
    subprocess.run([sys.executable, str(HERE / "prepare_smollm2.py")], check=True)
    if FOLDER.exists():
        return
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "smollm2")
    unfinished = FOLDER.with_suffix(".tmp")
    for loss in ("dpo", "kto"):
        (unfinished / loss).mkdir(parents=True, exist_ok=True)
        rows = pa.concat_tables(pq.read_table(DATA / f"{loss}_en" / f"{split}.parquet") for split in SPLITS)
        prompts = (
            tokenizer.apply_chat_template(prompt, add_generation_prompt=True) for prompt in rows["prompt"].to_pylist()
        )
        short = rows.filter(pa.array([len(prompt["input_ids"]) <= PROMPT_TOKENS for prompt in prompts]))
        turns = [TURNS[i % len(TURNS)] for i in range(len(short))]
        for split in SPLITS:
            chosen = short.filter(pa.array([turn == split for turn in turns]))
            pq.write_table(chosen, unfinished / loss / f"{split}.parquet", compression="zstd")
            print(f"{loss} {split:<10} {len(chosen)} of {len(rows)} rows")
    unfinished.rename(FOLDER)


if __name__ == "__main__":
    main()
