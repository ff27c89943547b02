"""scikit-learn: logistic regression on timm's features, its penalty by cross-validation.

https://scikit-learn.org/stable/modules/generated/sklearn.linear_model.LogisticRegressionCV.html: ten penalties, five
folds, after a StandardScaler (its user guide: solvers converge faster on scaled data); every labelled image is
fitted to. Features: `timm.create_model(..., num_classes=0)` (https://huggingface.co/docs/timm/feature_extraction) in
timm's own view.
"""

from door import Task, read_task


def fit(task: Task) -> None:
    # user code
    import timm
    import torch
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    backbone = timm.create_model(f"local-dir:{task.weights}", pretrained=True, num_classes=0).eval()
    view = timm.data.create_transform(**timm.data.resolve_data_config({}, model=backbone))

    def features(folder):
        images = ImageFolder(str(folder), view)
        with torch.inference_mode():
            return images, torch.cat([backbone(x) for x, _ in DataLoader(images, 64)]).numpy()

    images, x = features(task.cell / "train")
    regression = LogisticRegressionCV(max_iter=1000, random_state=task.seed, **task.option("learning_rate"))
    classifier = make_pipeline(StandardScaler(), regression).fit(x, images.targets)
    # end of user code
    task.mark_fitted()
    # user code
    test, x = features(task.cell / "test")
    probabilities = classifier.predict_proba(x)
    # end of user code
    names = [task.name_of(path) for path, _ in test.samples]
    task.write(names, probabilities, images.classes, ("scikit-learn", "timm", "torch"))


if __name__ == "__main__":
    task = read_task()
    task.watch_torch()
    fit(task)
