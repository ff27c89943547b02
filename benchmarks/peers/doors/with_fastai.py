"""fastai: `vision_learner(...).fine_tune(4)`, and with the rate that `lr_find` suggests.

Settings: chapter 2 of the library's book, which fine-tunes on 150 images a class
(https://github.com/fastai/fastbook/blob/master/02_production.ipynb): 20 % for validation,
RandomResizedCrop(min_scale=0.5), `aug_transforms()`, four epochs after one frozen. `lr_find` and its valley:
https://docs.fast.ai/callback.schedule.html. The batch is the default of 64, or all training images where there are
fewer. fastai drops what does not fill a batch, so 120 images make one step an epoch: `batch16` gives it more steps,
and is ours. Local weights: a timm name may be `local-dir:FOLDER`.
"""

from door import Task, read_task


def fine_tune(task: Task) -> None:
    # user code
    from fastai.callback.schedule import valley
    from fastai.vision.all import (
        ImageDataLoaders,
        RandomResizedCrop,
        aug_transforms,
        error_rate,
        set_seed,
        vision_learner,
    )

    set_seed(task.seed)
    images = ImageDataLoaders.from_folder(
        task.cell / "train",
        valid_pct=0.2,
        seed=task.seed,
        item_tfms=RandomResizedCrop(task.pixels, min_scale=0.5),
        batch_tfms=aug_transforms(),
        bs=min(16 if task.variant == "batch16" else 64, int(0.8 * task.num_train)),
    )
    learner = vision_learner(images, f"local-dir:{task.weights}", metrics=error_rate, path=task.out)
    rate = {}
    if task.variant == "lr_find":
        rate = {"base_lr": learner.lr_find(suggest_funcs=(valley,), show_plot=False).valley}
    learner.fine_tune(task.epochs or 4, **rate, **task.option("base_rate"))
    # end of user code
    task.mark_fitted()
    # user code
    files = task.test_files
    probabilities, _ = learner.get_preds(dl=images.test_dl(files))
    # end of user code
    task.write([task.name_of(path) for path in files], probabilities, list(images.vocab), ("fastai", "timm", "torch"))


if __name__ == "__main__":
    task = read_task()
    task.watch_torch()
    fine_tune(task)
