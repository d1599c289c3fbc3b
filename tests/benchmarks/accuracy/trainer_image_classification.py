"""The peer of image-classification.yaml: transformers' Trainer on a small ResNet from a configuration.

Runs in every process of `torchrun --nproc_per_node 2`, from the repository's root; `run.py` starts it. The last line
of its output is one JSON object with the accuracy on dev (validation) and test.
"""

import numpy as np
from peer import accuracy, parquet_splits, parse_options, train_and_score, training_arguments
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    DefaultDataCollator,
    Trainer,
    ViTImageProcessorPil,
    set_seed,
)

DATA = "../shared/data/image-classification/mnist_10k"
SIDE = 28
CONFIG = {
    "model_type": "resnet",
    "num_channels": 1,
    "embedding_size": 16,
    "hidden_sizes": [32, 64],
    "depths": [2, 2],
    "layer_type": "basic",
    "num_labels": 10,
}


def main() -> None:
    options = parse_options()
    arguments = training_arguments(
        options,
        num_train_epochs=1,
        per_device_train_batch_size=32,  # 64 over two processes
        per_device_eval_batch_size=64,
        learning_rate=3e-3,
        train_sampling_strategy="random",  # pictures have no lengths to group by
        remove_unused_columns=False,
    )
    set_seed(options.seed)
    model = AutoModelForImageClassification.from_config(AutoConfig.for_model(**CONFIG))
    processor = ViTImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_mean=[0.5], image_std=[0.5], do_convert_rgb=False
    )
    with arguments.main_process_first():  # the other process reads the first one's cache
        splits = parquet_splits(DATA, options)

    def pixels(rows: dict[str, list]) -> dict[str, list]:
        images = [np.asarray(image)[:, :, None] for image in rows["image"]]
        return {
            "pixel_values": processor(images, input_data_format="channels_last")["pixel_values"],
            "labels": rows["label"],
        }

    splits = splits.with_transform(pixels)  # pictures are decoded as they are needed
    trainer = Trainer(
        model,
        arguments,
        train_dataset=splits["train"],
        data_collator=DefaultDataCollator(),
        compute_metrics=accuracy,
    )
    train_and_score(trainer, splits, "accuracy")


if __name__ == "__main__":
    main()
