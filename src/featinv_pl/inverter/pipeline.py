"""An inverter as users of diffusers expect it: pictures in and out, and folders that can be published."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Self, cast

import torch
from numpy.typing import NDArray
from torch import Generator, Tensor
from torch.nn.functional import cosine_similarity
from tqdm.auto import tqdm

from featinv_pl.errors import UserError
from featinv_pl.files import atomic
from featinv_pl.inverter.inputs import Picture, as_maps, as_noise, as_pictures, as_place, as_sampler, is_map, whole
from featinv_pl.inverter.inverter import Inverter
from featinv_pl.inverter.model_folder import Facts, read_model, write_model
from featinv_pl.inverter.outputs import FeatInvOutput, OutputType, converted
from featinv_pl.inverter.runs import Run, is_run
from featinv_pl.nets.backbone import Backbone
from featinv_pl.nets.frozen import products
from featinv_pl.nets.hub import INDEX, find_folder, push_folder
from featinv_pl.sampling.sampler import Sampler
from featinv_pl.sampling.solvers import OnStep, Step
from featinv_pl.types import Observation

SOURCE = "`source`"
# Of 256 pixels 16 images, which keep a GPU busy; refinement holds activations of the decoder for each.
PIXELS, REFINED_PIXELS, MOST = 16 * 256**2, 4 * 256**2, 256
CallbackOnStepEnd = Callable[["FeatInvPipeline", int, Tensor, dict[str, Any]], Mapping[str, Any] | None]


class FeatInvPipeline:
    """Reconstructs images from a picture's feature map, or from a map.

        pipeline = FeatInvPipeline.from_pretrained("folder-or-hub-name")
        output = pipeline("cat.jpg", num_samples=4)
        output.images[0].save("reconstruction.png")

    Args:
        inverter: The model, with the sampler that is used where a call does not name another.
    """

    def __init__(self, inverter: Inverter) -> None:
        self.inverter = inverter.eval()
        self._dtype: torch.dtype | None = None
        self._rounded: torch.dtype | None = None
        self._origin: Path | None = None  # the model folder that it was read from
        self._progress: dict[str, Any] = {}

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        classifier: Backbone | None = None,
        *,
        torch_dtype: torch.dtype | None = None,
        device: str | torch.device | int | None = None,
        revision: str | None = None,
    ) -> Self:
        """Load an inverter, on the CPU unless a device is given.

        Args:
            source: A model folder (`featinv-pl export`, `import`, `save_pretrained`), its name on the hub, the folder
                of a run of `featinv-pl fit`, or a checkpoint in it.
            classifier: The classifier, where it was a module in Python.
            torch_dtype: As in `to`.
            device: As in `to`.
            revision: Branch, tag or commit of a name on the hub.

        Raises:
            UserError: Files are missing or damaged, or the frozen parts are not those of the training.
        """
        local = Path(source)
        if revision is not None and local.exists():
            raise UserError(
                f"`revision`: '{source}' is on this disk, and only names on the hub have one. Leave it out."
            )
        if local.exists() and not (local / INDEX).is_file() and is_run(local):
            pipeline = cls(Run.find(local, SOURCE).inverter(SOURCE, classifier))
        else:
            folder = find_folder(str(source), ["*"], SOURCE, revision)
            pipeline = cls(read_model(folder, SOURCE, classifier))
            pipeline._origin = folder
        return pipeline.to(device=device, dtype=torch_dtype)

    def save_pretrained(self, folder: str | Path, facts: Facts | None = None) -> None:
        """Write a new model folder with a model card, complete or not at all.

        Raises:
            UserError: The folder is not empty, or weights are not in full precision.
        """
        folder = Path(folder)
        if self._rounded:
            raise UserError(f"This pipeline has held its weights in {self._rounded}. Load it again, and save that one.")
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise UserError(f"`folder`: '{folder}' exists, and is left as it is. Choose a new folder.")
        with atomic(folder) as partial:
            write_model(self.inverter, partial, folder.name, facts or Facts(), self._origin)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload an inverter",
        create_pr: bool = False,
        license: str | None = None,
    ) -> str:
        """Publish the model folder on the Hugging Face hub, and return the address of the commit.

        Arguments are as in diffusers: repository and branch are created if they are not there, and the token is that of
        `hf auth login` if None. `license` is that in the card, as the hub calls it; None is that of a known prior.

        Raises:
            UserError: The hub refuses or does not answer, or weights are not in full precision.
        """
        with TemporaryDirectory() as temporary:
            folder = Path(temporary, repo_id.rpartition("/")[2])
            self.save_pretrained(folder, Facts(license=license))
            return push_folder(folder, repo_id, private, token, revision, commit_message, create_pr)

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.inverter.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of sampling: what `to` was given, else bfloat16 on CUDA and float32 elsewhere."""
        return self._dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)

    @property
    def components(self) -> dict[str, Any]:
        """The networks and the noise schedule, by diffusers' names where it has one."""
        inverter, prior = self.inverter, self.inverter.prior
        control = {"encoder": inverter.control.encoder, "controlnet": inverter.control.controlnet}
        frozen = {"classifier": inverter.classifier, "unet": prior.unet, "vae": prior.autoencoder.vae}
        return {**frozen, "scheduler": prior.schedule, **control}

    def __repr__(self) -> str:
        classifier, sampler = self.inverter.classifier, self.inverter.sampler
        size, shape = self.inverter.image_size, "x".join(map(str, classifier.feature_shape))
        return (
            f"{type(self).__name__}(\n"
            f"  classifier: {classifier.title}, layer {classifier.layer}, maps of {shape}\n"
            f"  prior: {self.inverter.prior.source}, images of {size}x{size}\n"
            f"  conditioning: {self.inverter.conditioning}\n  sampler: {sampler}\n"
            f"  device: {self.device}, dtype: {self.dtype}\n)"
        )

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move all networks, or none if it fails: to a device, a dtype, both, or those of a tensor, as torch's `to`.

        With bfloat16 (the default on CUDA) or float16, images are sampled in mixed precision, and the weights of prior,
        control and preview decoder take half the memory. The classifier stays fp32; CUDA then computes fp32 as TF32.

        Raises:
            UserError: There is no such device, or the dtype is another.
        """
        device, given = as_place(self.device, *args, **kwargs)
        chosen = given or self._dtype
        dtype = chosen or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        if dtype != torch.float32:
            _ = self.inverter.digests  # of the weights before they are rounded
        if device.type == "cuda":  # as in the command
            torch.set_float32_matmul_precision("high")
        parts = self.inverter.prior, self.inverter.control, self.inverter.preview
        halved = {id(one) for part in parts if part is not None for one in products(part)}
        tensors = [*self.inverter.parameters(), *self.inverter.buffers()]
        moved = [one.data.to(device, dtype if id(one) in halved else one.dtype) for one in tensors]
        for old, new in zip(tensors, moved, strict=True):
            old.data = new
        self._dtype, self._rounded = chosen, dtype if dtype != torch.float32 else self._rounded
        return self

    def with_sampler(self, **changes: Any) -> Self:
        """Change how images are sampled, by fields of `Sampler`."""
        self.inverter.sampler = replace(self.inverter.sampler, **changes)
        return self

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Options of tqdm for the bar over denoising steps, such as `disable=True` or `leave=False`."""
        self._progress = kwargs

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> Any:
        """A bar of tqdm with these options."""
        return tqdm(iterable, **{"desc": "sample", "unit": "step", "total": total, **self._progress})

    def crop(self, pictures: Picture | Sequence[Picture]) -> Tensor:
        """The classifier's crops of pictures of any size: (B, 3, H, W) in [-1, 1]."""
        return torch.stack([self.inverter.classifier.crop(picture) for picture in as_pictures(pictures)])

    def classify(self, images: Tensor) -> Observation:
        """Run the classifier on images (B, 3, H, W) in [-1, 1], a bounded number at a time."""
        most = max(1, min(MOST, PIXELS // images[0, 0].numel()))
        parts = [self.inverter.classifier.classify(part.to(self.device)) for part in images.split(most)]
        names: tuple[Literal["images", "features", "logits"], ...] = ("images", "features", "logits")
        images, features, logits = (torch.cat([part[name] for part in parts]) for name in names)
        return {"images": images, "features": features, "logits": logits}

    def reconstruct(
        self, features: Tensor, num_samples: int = 1, seed: int = 0, sampler: Sampler | None = None
    ) -> Tensor:
        """Reconstruct images (B * num_samples, 3, H, W), about [-1, 1], from one map (C, h, w) or B maps (B, C, h, w).

        All samples of the first map come first. Noise depends on the seed and on the sample's number alone, so equal
        numbers of two maps differ by the maps alone. A `sampler` replaces the inverter's own.
        """
        maps = as_maps(features, self.inverter.classifier.feature_shape).repeat_interleave(num_samples, 0)
        keys = [str(number % num_samples) for number in range(len(maps))]
        return self._sample(maps, keys, seed, sampler or self.inverter.sampler, None, None)

    def _sample(
        self, maps: Tensor, keys: list[str], seed: int, sampler: Sampler, size: int | None, on_step: OnStep | None
    ) -> Tensor:
        size = size or max(1, min(MOST, (REFINED_PIXELS if sampler.refine else PIXELS) // self.inverter.image_size**2))
        parts = [slice(start, start + size) for start in range(0, len(maps), size)]
        autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
        with self.progress_bar(total=len(parts) * sampler.steps * sampler.best_of) as bar, autocast:

            def after(step: Step, latents: Tensor) -> Tensor:
                bar.update()
                return on_step(step, latents) if on_step else latents

            reconstruct = self.inverter.reconstruct
            images = [reconstruct(maps[part].to(self.device), keys[part], seed, sampler, after) for part in parts]
        return torch.cat(images)

    def __call__(
        self,
        pictures: Picture | Sequence[Picture] | None = None,
        num_samples: int | None = None,
        seed: int | None = None,
        *,
        features: Tensor | NDArray[Any] | None = None,
        num_images_per_prompt: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: Generator | list[Generator] | None = None,
        batch_size: int | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: CallbackOnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> FeatInvOutput:
        """Reconstruct pictures of any size, which are cropped as the classifier does, or feature maps.

        Args:
            pictures: One or several; see `Picture`. A tensor with neither 1, 3 nor 4 channels is a feature map.
            num_samples: Reconstructions of each; 1 if it is not given.
            seed: Of the noise; 0 if neither it nor `generator` is given, so that a call can be repeated.
            features: Maps (C, h, w) or (B, C, h, w) in any float precision, in place of pictures.
            num_images_per_prompt: Another name of `num_samples`.
            num_inference_steps: Denoising steps; None is as the sampler has it, here and for the next.
            guidance_scale: Guidance scale; 1 disables guidance.
            generator: Draws the seed; or one for each reconstruction, in the order of the output.
            batch_size: Images that are sampled at once; None is 16 of 256 pixels, with refinement 4.
            output_type: `pil`, `pt` (tensor) or `np` (array); see `FeatInvOutput`.
            callback_on_step_end: Called after each step of each batch with the pipeline, the number of the step, the
                timestep and `{"latents": ...}`; `latents` in what it returns replace those.
            callback_on_step_end_tensor_inputs: Only latents can be had.

        Raises:
            UserError: An argument is wrong, or the memory of the device does not suffice.
        """
        if (pictures is None) == (features is None):
            raise UserError("Give either `pictures` or `features`.")
        if output_type not in ("pil", "pt", "np"):
            raise UserError(f"`output_type` cannot be {output_type!r}. Give pil, pt or np.")
        if unknown := {*callback_on_step_end_tensor_inputs} - {"latents"}:
            raise UserError(f"`callback_on_step_end_tensor_inputs`: {', '.join(unknown)} cannot be had. Give latents.")
        names = {"num_samples": num_samples, "num_images_per_prompt": num_images_per_prompt}
        numbers = {whole(name, value) for name, value in names.items() if value is not None} or {1}
        if len(numbers) > 1:
            raise UserError("`num_samples` and `num_images_per_prompt` are two names of the same. Give one of them.")
        [number] = numbers
        sampler = as_sampler(self.inverter.sampler, num_inference_steps, guidance_scale)
        features = cast(Any, pictures) if features is None and is_map(pictures) else features
        if features is None:
            features = self.classify(self.crop(cast(Any, pictures)))["features"]
        maps = as_maps(features, self.inverter.classifier.feature_shape).repeat_interleave(number, 0)
        drawn, keys = as_noise(seed, generator, number, len(maps))

        def on_step(step: Step, latents: Tensor) -> Tensor:
            ended = callback_on_step_end
            returned = ended and ended(self, step.number, step.timestep, {"latents": latents})
            return cast(Tensor, (returned or {}).get("latents", latents))

        try:
            size = None if batch_size is None else whole("batch_size", batch_size)
            found = self.classify(self._sample(maps, keys, drawn, sampler, size, on_step))
        except torch.OutOfMemoryError as error:
            raise UserError(f"The memory of {self.device} does not suffice. Give a smaller `batch_size`.") from error
        maps, features, logits = maps.cpu(), found["features"].cpu(), found["logits"].cpu()
        cosine = cosine_similarity(features, maps).mean((1, 2))
        return FeatInvOutput(converted(found["images"], output_type), features, logits, cosine)
