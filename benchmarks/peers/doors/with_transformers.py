"""Hugging Face `Trainer`, in the way of `run_image_classification.py`.

https://github.com/huggingface/transformers/tree/main/examples/pytorch/image-classification: rate 2e-5, five epochs,
batches of 8, evaluated and saved after each epoch, the best loaded at the end; RandomResizedCrop and flip for
training, resize and crop for judging, 15 % for validation (the script's default). timm weights through `TimmWrapper`
(https://huggingface.co/docs/transformers/model_doc/timm_wrapper), from a local folder.
`raised` is the same at 5e-5 for a second look: what `TrainingArguments` takes by itself.
"""

from door import Task, read_task


def fine_tune(task: Task) -> None:
    # user code
    import numpy as np
    import torch
    from datasets import load_dataset
    from torchvision.transforms import (
        CenterCrop,
        Compose,
        Normalize,
        RandomHorizontalFlip,
        RandomResizedCrop,
        Resize,
        ToTensor,
    )
    from transformers import AutoModelForImageClassification, Trainer, TrainingArguments, set_seed

    set_seed(task.seed)
    cache = str(task.out / "cache")
    images = load_dataset("imagefolder", data_dir=str(task.cell / "train"), split="train", cache_dir=cache)
    test = load_dataset("imagefolder", data_dir=str(task.cell / "test"), split="train", cache_dir=cache)
    parts = images.train_test_split(0.15, seed=task.seed)
    names = images.features["label"].names
    cfg = task.config["pretrained_cfg"]
    scale = [ToTensor(), Normalize(cfg["mean"], cfg["std"])]
    vary = Compose([RandomResizedCrop(task.pixels), RandomHorizontalFlip(), *scale])
    view = Compose([Resize(round(task.pixels / cfg["crop_pct"])), CenterCrop(task.pixels), *scale])

    def through(transform):
        return lambda rows: {
            "pixel_values": [transform(image.convert("RGB")) for image in rows["image"]],
            "labels": rows["label"],
        }

    parts["train"].set_transform(through(vary))
    parts["test"].set_transform(through(view))
    test.set_transform(through(view))
    model = AutoModelForImageClassification.from_pretrained(
        task.weights, num_labels=len(names), ignore_mismatched_sizes=True, dtype=torch.float32
    )
    settings = TrainingArguments(
        output_dir=str(task.out / "run"),
        remove_unused_columns=False,
        learning_rate=5e-5 if task.variant == "raised" else 2e-5,
        num_train_epochs=task.epochs or 5,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        logging_strategy="steps",
        logging_steps=10,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        save_total_limit=3,
        seed=task.seed,
        report_to="none",
        **task.option("learn_rate"),
    )
    trainer = Trainer(model, settings, train_dataset=parts["train"], eval_dataset=parts["test"])
    trainer.train(resume_from_checkpoint=task.resume)
    # end of user code
    task.mark_fitted()
    # user code
    logits = trainer.predict(test).predictions
    exponents = np.exp(logits - logits.max(1, keepdims=True))
    # end of user code
    plain = load_dataset("imagefolder", data_dir=str(task.cell / "test"), split="train", cache_dir=cache)
    files = [row["path"] for row in plain.cast_column("image", _undecoded())["image"]]
    probabilities = exponents / exponents.sum(1, keepdims=True)
    task.write([task.name_of(path) for path in files], probabilities, names, ("transformers", "timm", "torch"))


def _undecoded():
    from datasets import Image

    return Image(decode=False)


if __name__ == "__main__":
    task = read_task()
    task.watch_torch()
    fine_tune(task)
