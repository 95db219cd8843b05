"""Explaining the prototypes of any network that gives maps of similarities: local scores, and global ones as sums.

Source: arXiv 2011.02863, section 3. Differences from the authors' code: nothing is written to disk on the way, the
number of prototypes is the network's own, and the scores of a set of images are running sums instead of a growing
table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any, ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from proto_core.modes import evaluation_mode
from proto_core.systems import Paper
from proto_vision.explaining.perturbations import CHARACTERISTICS, check_characteristics, perturb_all
from proto_vision.explaining.scores import LocalScores, local_scores, weighted_mean

__all__ = ["CheckpointInput", "CheckpointMaps", "PrototypeExplainer", "image_versions"]


class PrototypeExplainer:
    """Says for each prototype which property of an image matters, such as its hue or the shape.

    Calling it is :meth:`local`. :meth:`run` takes in further images; :meth:`global_scores` is the mean over all images
    taken in since the start or :meth:`reset`. Sums are kept, ``[P, Q]`` numbers, however many images there are.

    Args:
        model: images ``[N, channels, S, S]`` -> maps of similarities ``[N, P, h, w]``; a module is asked in evaluation
            mode, on its own device.
        preprocess: image ``[3, H, W]`` uint8 -> model input ``[channels, S, S]``: resizing and normalisation, which
            come after the change of the image.
        characteristics: which properties, axis Q of all scores.

    Raises:
        ValueError: an unknown characteristic, or one twice.

    Source:
        arXiv 2011.02863, section 3.

    Example:
        >>> import torch
        >>> from proto_vision.explaining import PrototypeExplainer
        >>> light = lambda images: images.mean(1, keepdim=True)  # one prototype that looks for light
        >>> explainer = PrototypeExplainer(light, lambda image: image / 255, characteristics=("shape", "brightness"))
        >>> grey = torch.full((3, 8, 8), 100, dtype=torch.uint8)
        >>> explainer.local(grey).delta.round(decimals=3)  # 0.8 times as bright, and the same after rolling
        tensor([[[0.0000],
                 [0.0780]]])
        >>> explainer.run([grey, grey]).global_scores().shape
        torch.Size([1, 2])
    """

    paper: ClassVar[Paper] = Paper(
        title="This Looks Like That, Because ... Explaining Prototypes for Interpretable Image Recognition",
        year=2021,
        arxiv="2011.02863",
        code="M-Nauta/Explaining_Prototypes@02715e0",
        evidence="code",
        summary="Which visible property makes a part look like a prototype: hue, shape, texture, contrast, saturation.",
        claim="Global scores of training and test images agree, and follow the property that tells the classes apart.",
    )

    def __init__(
        self,
        model: Callable[..., Any],
        preprocess: Callable[..., Any],
        *,
        characteristics: Sequence[str] = CHARACTERISTICS,
    ) -> None:
        self.model, self.preprocess = model, preprocess
        self.characteristics = check_characteristics(characteristics)
        self.reset()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model!r}, {self.preprocess!r}, characteristics={self.characteristics})"

    def __call__(self, image: UInt8[Tensor, "3 H W"]) -> LocalScores:
        """See :meth:`local`."""
        return self.local(image)

    def reset(self) -> None:
        """Forget all images taken in."""
        self.num_images = 0
        self._total: Tensor | None = None
        self._weight: Tensor | None = None

    def versions(self, image: UInt8[Tensor, "3 H W"]) -> Float[Tensor, "versions channels height width"]:
        """Model inputs of an image and of its Q changed versions, the original first."""
        return image_versions(image, self.preprocess, self.characteristics)

    def local(self, image: UInt8[Tensor, "3 H W"]) -> LocalScores:
        """Scores of one image, N = 1; the global scores do not change.

        Args:
            image: RGB in its original size (the crop, where a data set is cropped).
        """
        return self.scores_of(self.versions(image)[None])

    @torch.no_grad()
    def scores_of(self, inputs: Float[Tensor, "N versions channels height width"]) -> LocalScores:
        """Local scores of images whose versions are prepared; one forward pass.

        Raises:
            ValueError: another number of versions, maps that are not ``[N, P, h, w]``, NaN in them.
        """
        wanted = 1 + len(self.characteristics)
        if inputs.ndim != 5 or inputs.shape[1] != wanted or len(inputs) == 0:
            shape = f"[N, {wanted}, channels, S, S]"
            raise ValueError(f"inputs: found shape {tuple(inputs.shape)}, needed {shape} with N at least 1")
        module = self.model if isinstance(self.model, nn.Module) else None
        place = next(module.parameters(), None) if module is not None else None
        images = inputs.flatten(0, 1)
        with evaluation_mode(module) if module is not None else nullcontext():
            maps = self.model(images if place is None else images.to(place.device))
        if maps.ndim != 4 or len(maps) != len(images):
            raise ValueError(f"model: gave shape {tuple(maps.shape)} for {len(images)} images, needed [N, P, h, w]")
        maps = maps.unflatten(0, (-1, wanted))
        return local_scores(maps[:, 0], maps[:, 1:])

    def update(self, inputs: Float[Tensor, "N versions channels height width"]) -> LocalScores:
        """Take in images whose versions are prepared (see :meth:`versions`); their local scores."""
        found = self.scores_of(inputs)
        delta, weights = found.delta.double(), found.similarity.double()
        total, weight = (delta * weights[:, None]).sum(0).T, weights.sum(0)
        if self._total is not None and self._weight is not None:
            if self._total.shape != total.shape:
                shapes = f"{len(total)} prototypes, before {len(self._total)}"
                raise ValueError(f"model: found {shapes}, needed the same (reset() begins anew)")
            total, weight = self._total + total, self._weight + weight
        self._total, self._weight = total, weight
        self.num_images += len(inputs)
        return found

    def run(self, images: Iterable[UInt8[Tensor, "3 H W"]], *, batch_size: int = 8) -> PrototypeExplainer:
        """Take in images; they may differ in size, and be made on the way.

        Args:
            images: RGB in their original size.
            batch_size: images that pass through the model at once, each in all its versions.

        Returns:
            The explainer itself.

        Raises:
            ValueError: no image, or a batch size below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: found {batch_size}, needed at least 1")
        versions = map(self.versions, images)
        count = 0
        while batch := list(islice(versions, batch_size)):
            self.update(torch.stack(batch))
            count += len(batch)
        if not count:
            raise ValueError("images: found none, needed one at least")
        return self

    def global_scores(self) -> Float[Tensor, "P Q"]:
        """Means over all images taken in, weighted by their similarity; NaN where that adds up to nothing.

        Raises:
            ValueError: no image was taken in.
        """
        if self._total is None or self._weight is None:
            raise ValueError("images: found none, needed run() or update() first")
        return weighted_mean(self._total, self._weight)


def image_versions(
    image: UInt8[Tensor, "3 H W"], preprocess: Callable[..., Any], characteristics: Sequence[str]
) -> Float[Tensor, "versions channels height width"]:
    """Model inputs of an image and of its changed versions, the original first."""
    return torch.stack([preprocess(version) for version in (image, *perturb_all(image, characteristics))])


class CheckpointMaps:
    """The maps of a checkpoint's part prototypes; the checkpoint is read on first use.

    Args:
        ckpt_path: a checkpoint of a system whose prototypes are parts.

    Raises:
        ValueError: on use: no such file, a system without part prototypes.
    """

    def __init__(self, ckpt_path: str) -> None:
        self.ckpt_path = ckpt_path
        self._network: Any = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.ckpt_path!r})"

    @property
    def network(self) -> Any:
        """The network, in evaluation mode."""
        if self._network is None:
            from proto_core.training import load_system
            from proto_vision.explanation import ExplainsParts

            network = load_system(self.ckpt_path, "proto-vision")
            if not isinstance(network, ExplainsParts):
                found = f"checkpoint {self.ckpt_path!r}: system {network.system!r}"
                raise ValueError(f"{found} has no part prototypes to explain")
            self._network = network
        return self._network

    def __call__(self, images: Float[Tensor, "N channels S S"]) -> Float[Tensor, "N P h w"]:
        """Similarities to all prototypes at every place."""
        return self.network.similarity_maps(images)


class CheckpointInput:
    """What a checkpoint's data module makes of an image in testing; the checkpoint is read on first use.

    Args:
        ckpt_path: a checkpoint written by the command line.
        root: where the training data is now, if it moved.

    Raises:
        ValueError: on use: no such file, or one that does not say how its data was read.
    """

    def __init__(self, ckpt_path: str, root: str | None = None) -> None:
        self.ckpt_path, self.root = ckpt_path, root
        self._data: Any = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.ckpt_path!r}, root={self.root!r})"

    @property
    def data(self) -> Any:
        """The data module."""
        if self._data is None:
            from proto_core.cli.training import data_from_checkpoint

            self._data = data_from_checkpoint(self.ckpt_path, {"root": self.root})
        return self._data

    def __call__(self, image: UInt8[Tensor, "3 H W"]) -> Float[Tensor, "channels S S"]:
        """Model input of an image."""
        return self.data.eval_transform()(F.to_pil_image(image))
