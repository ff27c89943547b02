"""BiT-HyperRule: a rule rather than a library, in plain torch on the same backbone.

Kolesnikov et al., ECCV 2020, section 3.3, https://arxiv.org/abs/1912.11370, and its repository
(https://github.com/google-research/big_transfer): fewer than 20,000 images: 500 steps of SGD with momentum 0.9,
warmed up over 100, divided by ten at 200, 300 and 400, no mixup, no weight decay, a head of zeros, random crops of a
slightly larger square, flips; every labelled image is trained on. Batches are drawn with replacement where the
images do not fill one. `batch128` has the repository's lighter setting (`--batch 128 --base_lr 0.001`); `batch32`
goes on in that ratio, for processors, and is ours. Two departures: the rule would show 480 px of images this large,
here all peers see the same pixels; and its networks have group norm, while batch norm of this backbone keeps
learning its statistics, as in any plain loop.
"""

from door import Task, read_task

SETTINGS = {"batch128": (128, 0.001), "batch32": (32, 0.00025)}
SCHEDULE = (100, 200, 300, 400, 500)


def rate_at(step: int, base: float) -> float:
    """The rule's rate for tasks of fewer than 20,000 images, steps counted from 0."""
    if step < SCHEDULE[0]:
        return base * step / SCHEDULE[0]
    return base / 10 ** sum(step > end for end in SCHEDULE[1:-1])


def fine_tune(task: Task) -> None:
    # user code
    import timm
    import torch
    from torch.utils.data import DataLoader, RandomSampler
    from torchvision import transforms as T
    from torchvision.datasets import ImageFolder

    torch.manual_seed(task.seed)
    cfg = task.config["pretrained_cfg"]
    larger = round(task.pixels * 512 / 480)
    scale = [T.ToTensor(), T.Normalize(cfg["mean"], cfg["std"])]
    vary = T.Compose([T.Resize((larger, larger)), T.RandomCrop(task.pixels), T.RandomHorizontalFlip(), *scale])
    view = T.Compose([T.Resize((task.pixels, task.pixels)), *scale])
    images, test = ImageFolder(str(task.cell / "train"), vary), ImageFolder(str(task.cell / "test"), view)
    model = timm.create_model(f"local-dir:{task.weights}", pretrained=True, num_classes=len(images.classes))
    for parameter in model.get_classifier().parameters():
        torch.nn.init.zeros_(parameter)
    batch, base = SETTINGS[task.variant]
    steps = task.epochs * len(images) // batch + 1 if task.epochs else SCHEDULE[-1]
    optimizer = torch.optim.SGD(model.parameters(), lr=base, momentum=0.9, **task.option("learning_rate"))
    draws = RandomSampler(images, replacement=len(images) < batch, num_samples=steps * batch)
    for step, (x, y) in enumerate(DataLoader(images, batch, sampler=draws)):
        optimizer.param_groups[0]["lr"] = rate_at(step, base)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    # end of user code
    task.mark_fitted()
    # user code
    with torch.inference_mode():
        probabilities = torch.cat([model.eval()(x).softmax(1) for x, _ in DataLoader(test, 64)])
    # end of user code
    names = [task.name_of(path) for path, _ in test.samples]
    task.write(names, probabilities, images.classes, ("timm", "torch"))


if __name__ == "__main__":
    task = read_task()
    task.watch_torch()
    fine_tune(task)
