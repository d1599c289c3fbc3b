"""Keys of fine-tuning recipes: which values are refused. `tests/train/test_recipes.py` shows how they train."""

from pathlib import Path

import pytest

from launcher.errors import SpecError
from launcher.spec.loader import load_job
from launcher.tasks import params_class

_JOB = """\
name: recipe
task: {type: text-classification}
model: {name: models/minilm}
data: {train: data/train.parquet}
"""


def problems(folder: Path, *overrides: str) -> tuple[str, ...]:
    """Return the problems of the job with the overrides."""
    (folder / "job.yaml").write_text(_JOB)
    with pytest.raises(SpecError) as caught:
        load_job(folder / "job.yaml", overrides, params_class)
    return caught.value.problems


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("task.class_weights=balancd", "task.class_weights is balancd; give balanced or {class: weight above 0}"),
        ("task.class_weights={0: 1, 1: -2}", "task.class_weights is {0: 1, 1: -2}; give balanced or {class: weight"),
        ("task.class_weights={a: yes}", "task.class_weights is {a: yes}; give balanced or {class: weight above 0}"),
        ("task.label_smoothing=1.0", "task.label_smoothing is 1.0, which is not below 1; give a number of at least 0"),
        ("train.optimizer={type: sgd, beta1: 0.5}", "train.optimizer.beta1 is not a key of train.optimizer"),
        ("train.optimizer={type: sgd, momentum: 0, nesterov: true}",
         "train.optimizer.nesterov needs a momentum above 0; set one or drop nesterov"),
        ("model.lora={use_dora: true}", "model.lora.use_dora is not a key of model.lora; did you mean dora?"),
    ],
)  # fmt: skip
def test_a_wrong_value_of_a_recipe_is_refused(tmp_path: Path, override: str, problem: str) -> None:
    (sentence,) = problems(tmp_path, override)
    assert problem in sentence


@pytest.mark.parametrize("key", ["label_smoothing=0.1", "class_weights=balanced"])
def test_loss_options_are_refused_for_regression(tmp_path: Path, key: str) -> None:
    name = key.split("=")[0]
    expected = f"task.{name} is for one class per row, and kind is regression; drop {name}"
    (sentence,) = problems(tmp_path, "task.kind=regression", f"task.{key}")
    assert expected in sentence


def test_class_names_may_be_numbers_in_yaml(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(_JOB)
    job = load_job(tmp_path / "job.yaml", ("task.class_weights={0: 1, 1: 2}",), params_class)
    assert job.task.parameters()["class_weights"] == {"0": 1.0, "1": 2.0}


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (("train.optimizer={type: adafactor}", "parallel.zero=2"),
         "parallel.zero is 2, and train.optimizer is adafactor, which needs whole matrices, and ZeRO shards "
         "them; set parallel.zero: 0, or use another optimizer"),
        (("train.optimizer={type: sgd}", "parallel.offload_optimizer=true"),
         "parallel.offload_optimizer needs adamw, which has a CPU kernel, and train.optimizer is sgd; drop "
         "offload_optimizer or use adamw"),
        (("model.lora={rank: 4}", "model.freeze={layers: 1}"),
         "model.freeze has no effect with lora, which trains only its adapters and the head; drop freeze"),
        (("model.quantization=nf4",),
         "model.quantization is nf4, and weights of 4 bits cannot be trained; add lora, or drop quantization"),
        (("model.quantization=nf4", "model.lora={rank: 4}", "model.from_config={model_type: gpt2}"),
         "model.quantization is nf4, and from_config starts from random weights, which must be trained; drop one of "
         "them"),
        *(
            (("model.quantization=nf4", "model.lora={rank: 4}", key),
             "model.quantization is nf4 and the ZeRO stage is 3, which would cut 4-bit weights apart from their "
             "scales; set parallel.zero: 2 without offload_parameters and offload_path, or drop quantization")
            for key in (
                "parallel.zero=3", "parallel.offload_parameters=true",
                "parallel={offload_optimizer: true, offload_path: /mnt/nvme}",
            )
        ),
    ],
)  # fmt: skip
def test_contradicting_keys_are_refused(tmp_path: Path, overrides: tuple[str, ...], problem: str) -> None:
    (sentence,) = problems(tmp_path, *overrides)
    assert problem in sentence


def test_an_optimizer_without_a_type_is_adamw(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(_JOB)
    job = load_job(tmp_path / "job.yaml", ("train.optimizer={weight_decay: 0.1}",), params_class)
    assert (job.train.optimizer.type, job.train.optimizer.weight_decay) == ("adamw", 0.1)
    adafactor = load_job(
        tmp_path / "job.yaml", ("train.optimizer={type: adafactor}", "cluster.workers=4"), params_class
    )
    assert adafactor.zero_stage == 0


@pytest.mark.parametrize(
    ("overrides", "size"),
    [(("train.batch_size=16",), 64), (("train.batch_size=512",), 512), (("evaluation.batch_size=8",), 8)],
)
def test_evaluation_batches_are_as_large_as_those_of_the_training(
    tmp_path: Path, overrides: tuple[str, ...], size: int
) -> None:
    (tmp_path / "job.yaml").write_text(_JOB)
    assert load_job(tmp_path / "job.yaml", overrides, params_class).evaluation_batch_size == size
