"""Keras: the guide "Transfer learning & fine-tuning", on `keras.applications.MobileNetV2`.

https://keras.io/guides/transfer_learning/: head first (Adam at 1e-3, 20 epochs, batches of 32), then everything
(Adam at 1e-5, 10 epochs), batch norm held still throughout; flips and rotations of 0.1, dropout 0.2. Folders by
`keras.utils.image_dataset_from_directory`, as the guide says, 20 % for validation.
Local weights: `put_back` writes the card's weights into Keras' layers, so it is the same function of the same pixels
(batch norm's epsilon is 1e-3 there and 1e-5 in timm; the scales make up for it). Only MobileNetV2 with `pad_type:
same`, whose weights came from Keras: the EfficientNet-Lite cards have no counterpart in `keras.applications`.
"""

import numpy as np
from door import Task, read_task

EPSILON = {"keras": 1e-3, "timm": 1e-5}


def timm_layers(names: list[str]) -> list[str]:
    """Convolutions of a timm MobileNetV2 in the order of its forward pass, without `.weight`."""

    def place(name: str) -> tuple:
        part = name.split(".")
        if part[0] != "blocks":
            return (0 if part[0] == "conv_stem" else 2,)
        order = {"conv_pw": 1 if part[1] == "0" else 0, "conv_dw": 0 if part[1] == "0" else 1, "conv_pwl": 2}
        return 1, int(part[1]), int(part[2]), order[part[3]]

    convolutions = [name.removesuffix(".weight") for name in names if "conv" in name and name.endswith(".weight")]
    return sorted(convolutions, key=place)


def norm_of(convolution: str) -> str:
    """The batch norm that follows a convolution of a timm MobileNetV2."""
    *path, last = convolution.split(".")
    if not path:
        return {"conv_stem": "bn1", "conv_head": "bn2"}[last]
    first = path[1] == "0"
    names = {"conv_dw": "bn1", "conv_pw": "bn2"} if first else {"conv_pw": "bn1", "conv_dw": "bn2", "conv_pwl": "bn3"}
    return ".".join([*path, names[last]])


def put_back(model: object, weights: dict[str, np.ndarray]) -> None:
    """Write the weights of a timm MobileNetV2 into Keras' own; the same function."""
    import keras

    convolutions = [
        layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D | keras.layers.DepthwiseConv2D)
    ]
    norms = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    for name, convolution, norm in zip(timm_layers(list(weights)), convolutions, norms, strict=True):
        kernel = weights[f"{name}.weight"]  # (out, in, H, W), depthwise (out, 1, H, W)
        is_depthwise = isinstance(convolution, keras.layers.DepthwiseConv2D)
        convolution.set_weights([kernel.transpose(2, 3, 0, 1) if is_depthwise else kernel.transpose(2, 3, 1, 0)])
        part = {key: weights[f"{norm_of(name)}.{key}"] for key in ("weight", "bias", "running_mean", "running_var")}
        scale = np.sqrt((part["running_var"] + EPSILON["keras"]) / (part["running_var"] + EPSILON["timm"]))
        norm.set_weights([part["weight"] * scale, part["bias"], part["running_mean"], part["running_var"]])


def fine_tune(task: Task) -> None:
    if (task.config["architecture"], task.config["model_args"]) != ("mobilenetv2_100", {"pad_type": "same"}):
        raise SystemExit(f"keras.applications has no {task.config['architecture']}; not the same weights, so not run.")
    import keras
    from safetensors.numpy import load_file

    weights = {name: value.astype("float32") for name, value in load_file(task.weights / "model.safetensors").items()}
    first_batch = keras.callbacks.LambdaCallback(on_train_batch_begin=task.mark_first_batch)
    # user code
    keras.utils.set_random_seed(task.seed)
    size = (task.pixels, task.pixels)
    train, val = keras.utils.image_dataset_from_directory(
        task.cell / "train", validation_split=0.2, subset="both", seed=task.seed, image_size=size, batch_size=32
    )
    classes = train.class_names
    base = keras.applications.MobileNetV2(weights=None, input_shape=(*size, 3), include_top=False)
    # end of user code
    put_back(base, weights)
    # user code
    base.trainable = False
    inputs = keras.Input((*size, 3))
    x = keras.layers.RandomFlip("horizontal")(inputs)
    x = keras.layers.RandomRotation(0.1)(x)
    x = keras.layers.Rescaling(1 / 127.5, offset=-1)(x)
    x = base(x, training=False)
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = keras.layers.Dropout(0.2)(x)
    model = keras.Model(inputs, keras.layers.Dense(len(classes))(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(**task.option("learnrate")), loss, metrics=["accuracy"])
    model.fit(train, validation_data=val, epochs=task.epochs or 20, verbose=2, callbacks=[first_batch])
    base.trainable = True
    model.compile(keras.optimizers.Adam(1e-5), loss, metrics=["accuracy"])
    model.fit(train, validation_data=val, epochs=task.epochs or 10, verbose=2)
    # end of user code
    task.mark_fitted()
    # user code
    test = keras.utils.image_dataset_from_directory(task.cell / "test", shuffle=False, image_size=size, batch_size=32)
    probabilities = keras.ops.softmax(model.predict(test, verbose=2))
    # end of user code
    names = [task.name_of(path) for path in test.file_paths]
    task.write(names, probabilities, classes, ("keras", "tensorflow"))


if __name__ == "__main__":
    fine_tune(read_task())
