"""AutoGluon multimodal: `MultiModalPredictor.fit` on a table of files.

https://auto.gluon.ai/stable/tutorials/multimodal/image_prediction/beginner_image_cls.html: a table of image and
label, `fit` without further settings (AdamW at 1e-4 with layer-wise decay, 20 epochs, the three best averaged
greedily), here without its time limit. Local weights: `model.timm_image.checkpoint_name` names a folder with
`config.json` and `pytorch_model.bin`
(https://auto.gluon.ai/stable/tutorials/multimodal/advanced_topics/customization.html). That door takes no arguments
of the architecture: a network with `pad_type: same` is built with the padding of PyTorch, so its features are not
quite those of the card.
"""

from door import Task, read_task


def fine_tune(task: Task) -> None:
    # user code
    import pandas as pd
    from autogluon.multimodal import MultiModalPredictor

    files = [path for name in task.classes for path in sorted((task.cell / "train" / name).iterdir())]
    table = pd.DataFrame({"image": map(str, files), "label": [path.parent.name for path in files]})
    if task.resume:
        predictor = MultiModalPredictor.load(str(task.out / "run"), resume=True)
    else:
        predictor = MultiModalPredictor(label="label", path=str(task.out / "run"))
    hyperparameters = {
        "model.names": ["timm_image"],
        "model.timm_image.checkpoint_name": str(task.weights),
        "model.timm_image.image_size": task.pixels,
        **({"optim.max_epochs": task.epochs} if task.epochs else {}),
        **task.option("optim.learning_rate"),
    }
    predictor.fit(table, seed=task.seed, hyperparameters=hyperparameters)
    # end of user code
    task.mark_fitted()
    # user code
    test = task.test_files
    probabilities = predictor.predict_proba(pd.DataFrame({"image": map(str, test)}))
    # end of user code
    names = [task.name_of(path) for path in test]
    libraries = ("autogluon.multimodal", "timm", "torch")
    task.write(names, probabilities[task.classes].to_numpy(), task.classes, libraries)


if __name__ == "__main__":
    task = read_task()
    task.watch_torch()
    fine_tune(task)
