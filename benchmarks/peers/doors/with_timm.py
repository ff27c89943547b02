"""timm's `train.py`: as shipped, and as its maintainer advises for fine-tuning.

The script is no part of the package: it is run from a clone of the repository at the version of the package,
`git clone --branch v1.0.28 https://github.com/huggingface/pytorch-image-models WORK/pytorch-image-models`
(https://huggingface.co/docs/timm/training_script). Local weights: `--model local-dir:FOLDER --pretrained`.

As shipped: no option but the data, the model, the classes, the size, the device and the seed: SGD at 0.1 * batch /
256, 300 epochs, cosine, label smoothing 0.1.
As advised: "If you're fine tuning to a completely different dataset with a new classifier ... 1/10 the default LR
for training from scratch might be a good starting point, 0.1 * (global_batch_size * .016 / 256)", of the RMSProp
recipe of the same family (https://github.com/huggingface/pytorch-image-models/issues/25; the recipe's other options:
https://huggingface.co/docs/timm/training_script, MobileNet-V3 and EfficientNet-B0). The advice names no number of
epochs: 30 here, cosine.
The batch is 128, or the largest power of two of which an epoch holds two: timm drops what does not fill a batch, and
fails where none is filled (v1.0.28). 20 % for validation; the best epoch on it is judged.
"""

import math
import os
import runpy
import sys

from door import Task, divide, read_task

ADVISED = "--opt rmsproptf --opt-eps .001 --weight-decay 1e-5 --warmup-lr 1e-6 --epochs 30 --sched cosine --drop 0.2"


def train(task: Task) -> None:
    folder = divide(task, task.out / "data", "validation")
    batch = min(128, 2 ** int(math.log2(0.4 * task.num_train)))
    # user code
    words = [
        "--data-dir",
        folder,
        "--model",
        f"local-dir:{task.weights}",
        "--pretrained",
        "--num-classes",
        len(task.classes),
        "--img-size",
        task.pixels,
        "-b",
        batch,
        "--device",
        "cpu",
        "--seed",
        task.seed,
        "--output",
        task.out,
        "--experiment",
        "run",
    ]
    if task.variant == "advised":
        words += [*ADVISED.split(), "--lr", 0.1 * batch * 0.016 / 256]
    # end of user code
    if task.epochs:
        words += ["--epochs", task.epochs, "--warmup-epochs", 0]
    if task.misspelt:
        words += ["--learning-rate", 0.001]
    if task.resume:
        words += ["--resume", task.out / "run" / "last.pth.tar"]
    script = os.path.join(os.environ["PEER_TIMM_SOURCE"], "train.py")  # noqa: PTH118
    sys.argv = [script, *map(str, words)]
    runpy.run_path(script, run_name="__main__")


def predict(task: Task) -> None:
    # user code
    import timm
    import torch
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    model = timm.create_model(f"local-dir:{task.weights}", num_classes=len(task.classes), pretrained=False)
    timm.models.load_checkpoint(model, str(task.out / "run" / "model_best.pth.tar"))
    view = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    images = ImageFolder(str(task.cell / "test"), view)
    with torch.inference_mode():
        probabilities = torch.cat([model.eval()(x).softmax(1) for x, _ in DataLoader(images, 64)])
    # end of user code
    names = [task.name_of(path) for path, _ in images.samples]
    task.write(names, probabilities, images.classes, ("timm", "torch"))


if __name__ == "__main__":
    task = read_task()
    task.watch_torch()
    train(task)
    task.mark_fitted()
    predict(task)
