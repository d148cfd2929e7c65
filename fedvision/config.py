"""The job file: what is trained, how, and what leaves a site.

One TOML file loads into one frozen ``Job``. An unknown key is an error that names the nearest key that
exists; ranges are checked here and nowhere else. ``docs/reference/job-file.md`` is made from this module.
"""

import difflib
import hashlib
import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedvision.errors import ConfigError

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
Reference = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
PositiveInt = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A part of the job file: frozen, and no key that is not declared."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TaskSection(Section):
    """What the model does. It must agree with every site's manifest."""

    kind: Literal["segmentation", "detection"] = Field(description="what is trained")
    spatial_dims: Literal[2, 3] = Field(2, description="2 for pictures, 3 for volumes")
    in_channels: PositiveInt = Field(
        1, description="image channels the network reads; colour is turned to grey for 1, grey repeated for 3"
    )
    classes: tuple[str, ...] = Field(
        min_length=1,
        description="foreground classes in the order of their label values; 1 is the first, 0 is background",
    )


class DataSection(Section):
    """Where the sites' data sets lie. Read by the simulation only; it is never sent to a site."""

    root: Path = Field(description="folder that holds one folder with a manifest.json for each site")
    sites: tuple[Name, ...] = Field(
        (), description="sites that train; empty means every site found below root"
    )
    held_out: tuple[Name, ...] = Field((), description="sites that only test the final model")
    root_set: Path | None = Field(
        None, description="folder of the root set's data set; a deployment has it at the server"
    )


class PreprocessingSection(Section):
    """What happens to every image before the network sees it; the same at every site."""

    intensity: Literal["zscore", "percentile", "window", "unit"] = Field(
        "zscore",
        description="zscore: per image and channel, mean 0 and deviation 1; percentile: 1st to 99.5th "
        "percentile to 0..1; window: `window` to 0..1 (CT); unit: divide by the data type's range",
    )
    window: tuple[float, float] | None = Field(
        None, description="lower and upper value for `window`, e.g. -160, 240"
    )
    spacing_mm: tuple[float, ...] | None = Field(
        None,
        description="resample volumes to this voxel size in mm, one number an axis; else the grid is kept",
    )
    transform: Reference | None = Field(
        None,
        description="your own `package.module:function`; gets and returns a dict with image, label or boxes",
    )

    @model_validator(mode="after")
    def _window_is_given(self) -> Self:
        if (self.intensity == "window") != (self.window is not None):
            raise ValueError('`window` and intensity = "window" belong together: give both or neither')
        if self.window is not None and self.window[0] >= self.window[1]:
            raise ValueError("`window` must be (lower, upper) with lower < upper")
        if self.spacing_mm is not None and any(s <= 0 for s in self.spacing_mm):
            raise ValueError("`spacing_mm` must be > 0")
        return self


class ModelSection(Section):
    """The network."""

    name: str = Field(
        description="a MONAI network (UNet, BasicUNet, DynUNet, SegResNet, SwinUNETR, UNETR, AttentionUnet), "
        "a detector (RetinaNet, FasterRCNN), or your own `package.module:function`"
    )
    args: dict[str, Any] = Field(
        {}, description="arguments of the network, with the names its own library uses"
    )
    local_normalisation: bool = Field(
        False, description="FedBN: normalisation layers stay at the site and are never sent or averaged"
    )


class TrainingSection(Section):
    """One round of local training at a site."""

    steps: PositiveInt | None = Field(None, description="optimiser steps a round; give this or `epochs`")
    epochs: Annotated[float, Field(gt=0)] | None = Field(
        None, description="passes over the site's training cases a round; give this or `steps`"
    )
    batch_size: PositiveInt = Field(4, description="crops or images a step")
    optimizer: Literal["adamw", "adam", "sgd"] = Field("adamw", description="starts afresh every round")
    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-3, description="of the first round")
    learning_rate_schedule: Literal["constant", "cosine"] = Field(
        "constant", description="cosine: falls over the rounds to 5 % of `learning_rate`"
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="of sgd")
    weight_decay: Annotated[float, Field(ge=0)] = Field(1e-5, description="of the optimiser")
    gradient_clip: Annotated[float, Field(gt=0)] | None = Field(
        None, description="largest L2 norm of a step's gradient; not the clip norm of the update"
    )
    loss: Literal["dice_ce", "dice", "dice_focal", "tversky", "cross_entropy", "detector"] | Reference = (
        Field("dice_ce", description="segmentation loss from MONAI; `detector` is the detector's own loss")
    )
    patch_size: tuple[PositiveInt, ...] | None = Field(
        None, description="segmentation: pixels or voxels of a training crop, one number an axis"
    )
    foreground_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        0.67, description="segmentation: share of training crops that are centred on a labelled pixel"
    )
    image_size: tuple[PositiveInt, ...] | None = Field(
        None, description="detection: images are resized to this many pixels, one number an axis"
    )
    augmentation: Literal["none", "light", "strong"] = Field(
        "light",
        description="light: flips, right-angle turns (volumes: left-right flips only), intensity; "
        "strong: also zoom, noise, blur, contrast; choose none where a class names a side",
    )
    amp: Literal["off", "bf16", "fp16"] = Field("off", description="mixed precision; fp16 needs a GPU")

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of `steps` and `epochs`")
        return self


class AggregationSection(Section):
    """How updates become the next global model."""

    rule: Literal["fedavg"] = Field("fedavg", description="weighted mean of the clipped updates")
    weighting: Literal["samples", "uniform"] = Field(
        "samples", description="weigh a site by its training cases, or all sites alike"
    )
    clip_norm: Annotated[float, Field(gt=0)] = Field(
        description="largest L2 norm of a site's update (local minus global weights); enforced at the site"
    )
    server_learning_rate: Annotated[float, Field(gt=0)] = Field(1.0, description="factor on the mean update")
    min_sites: PositiveInt = Field(
        1,
        description="a round with fewer accepted updates fails; with `secure` the smallest cohort counts too",
    )
    secure: bool = Field(
        True,
        description="secure aggregation: the server learns the sum of the updates and no single one; "
        "needs three sites or more",
    )


class SecureAggregationSection(Section):
    """What secure aggregation does beyond hiding single updates. Becomes part of the signed charter."""

    level: Literal["auto", "sum", "sketch", "gram"] = Field(
        "auto",
        description="sum: the server learns the sum alone; sketch: each site also opens a random sketch "
        "of its update, so that the clip norm is checked and a liar found; gram: only inner products of "
        "the sketches are opened; auto: sum below 5 sites, sketch below 10, gram from 10, but sum for "
        "models below 10,000 weights, where the others are refused",
    )
    max_colluding: Literal["auto"] | Annotated[int, Field(ge=1, le=84)] = Field(
        "auto",
        description="m: an update stays hidden from the server together with up to m other sites that help "
        "it; auto: the most there can be, a third of the sites less one. A smaller m lets a round do without "
        "more sites: (n - m - 1) / 2 of n, rounded down; a site refuses it unless its policy allows it",
    )
    smallest_cohort: Annotated[int, Field(ge=3, le=255)] = Field(
        5,
        description="a sum of fewer sites is refused by every site; below 5 a sum says much about each site, "
        "so writing 3 or 4 is a waiver that the charter names",
    )
    weight_cap: Annotated[int, Field(ge=1, le=10_000_000)] | None = Field(
        None,
        description="training cases above this add nothing to a site's weight; the simulation takes the "
        "largest site's number when it is absent",
    )
    release: tuple[Literal["test"], ...] = Field(
        ("test",),
        description="what each site releases on its own, in the clear: test, its sums of test statistics "
        "after the last round; without it only sums over all sites are known",
    )
    keep_sums: bool = Field(
        True,
        description="keep each round's sum in the run folder, so that `fedvision verify` can do the "
        "arithmetic again; 4 bytes a weight and round",
    )


RuleName = Literal[
    "norm",
    "clones",
    "root_cosine",
    "opposition",
    "spectral",
    "multi_krum",
    "geometric_median",
    "nearest_neighbours",
]


class DefenceSection(Section):
    """Whose updates are left out of a round's sum, and what happens after the last round. Becomes part of
    the signed charter."""

    rules: Literal["auto"] | tuple[RuleName, ...] = Field(
        "auto",
        description="applied in this order to norms and inner products of the updates; auto: norm, from 5 "
        "sites root_cosine if there is a root set, from 10 also clones, opposition and spectral; rules need "
        "level gram or sketch, or no secure aggregation; an empty list accepts every update",
    )
    max_malicious: Annotated[float, Field(ge=0, le=0.45)] = Field(
        0.2, description="share of the sites that may attack together; more than 0.2 needs a root set"
    )
    root: Literal["auto", "off"] = Field(
        "auto", description="auto: use the root set that data.root_set or the server names; off: do not"
    )
    repair: Literal["auto", "off", "finetune", "prune"] = Field(
        "auto",
        description="after the last round, on the root set: search for triggers and remove them; auto: the "
        "method that does best there; without a root set nothing is done",
    )


LARGEST_NOISE = 100


class PrivacySection(Section):
    """What is promised to each patient whose images train (differential privacy). Becomes part of the signed
    charter; what a site has spent on its patients is in its own ledger."""

    mode: Literal["off", "distributed", "local"] = Field(
        "off",
        description="distributed: a round is one gradient, each site adds its share of the noise under "
        "secure aggregation, and the server takes the step; local: each site adds all of the noise at each "
        "step of its training; off: no promise",
    )
    clip_norm: Annotated[float, Field(gt=0)] = Field(
        1.0, description="largest L2 norm of one patient's gradient, all his images together"
    )
    noise_multiplier: Annotated[float, Field(gt=0, le=LARGEST_NOISE)] = Field(
        1.0,
        description="standard deviation of the noise in clip norms, in the sum over sites (distributed) or "
        "in each site's step (local); `fedvision privacy plan` finds it",
    )
    patients: PositiveInt = Field(
        16, description="patients that a site draws on average, each by chance; a round or a step"
    )
    delta: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="chance that the promise does not hold; a tenth of one over a site's patients if absent",
    )

    @property
    def is_on(self) -> bool:
        """Whether anything is promised."""
        return self.mode != "off"


class EvaluationSection(Section):
    """How models are judged, at every site."""

    every: PositiveInt = Field(1, description="validate every so many rounds, and after the last")
    overlap: Annotated[float, Field(ge=0, lt=1)] = Field(0.25, description="segmentation: of sliding windows")
    surface_distances: bool = Field(
        True, description="segmentation: HD95 and average surface distance on test"
    )
    score_threshold: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.05, description="detection: boxes below this score are dropped"
    )
    max_detections: PositiveInt = Field(100, description="detection: boxes kept an image")
    bootstrap: Annotated[int, Field(ge=0, le=10_000)] = Field(
        200, description="resamples of patients for the 95 % intervals of the test metrics; 0 for none"
    )


class Job(Section):
    """A whole job file."""

    format: Literal[1] = Field(1, description="version of this file format")
    name: Name = Field(description="short name, used in folders and titles")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="reproduces the run bit for bit")
    rounds: PositiveInt = Field(description="rounds of local training and aggregation")
    task: TaskSection
    data: DataSection | None = None
    preprocessing: PreprocessingSection = PreprocessingSection()
    model: ModelSection
    training: TrainingSection
    aggregation: AggregationSection
    secure_aggregation: SecureAggregationSection = SecureAggregationSection()
    defence: DefenceSection = DefenceSection()
    privacy: PrivacySection = PrivacySection()
    evaluation: EvaluationSection = EvaluationSection()

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        dims = self.task.spatial_dims
        for field, value in (
            ("training.patch_size", self.training.patch_size),
            ("training.image_size", self.training.image_size),
            ("preprocessing.spacing_mm", self.preprocessing.spacing_mm),
        ):
            if value is not None and len(value) != dims:
                raise ValueError(f"{field} needs {dims} numbers for spatial_dims = {dims}, got {len(value)}")
        detects = self.task.kind == "detection"
        if detects != (self.training.loss == "detector"):
            raise ValueError('training.loss must be "detector" for detection, and only there')
        if not detects and self.training.patch_size is None:
            raise ValueError("training.patch_size is required for segmentation")
        if detects and self.training.image_size is None:
            raise ValueError("training.image_size is required for detection")
        self._check_privacy()
        if len(set(self.task.classes)) != len(self.task.classes):
            raise ValueError("task.classes has a name twice")
        if self.data is not None:
            named = self.data.sites + self.data.held_out
            twice = sorted({name for name in named if named.count(name) > 1})
            if twice:
                raise ValueError(f"data.sites and data.held_out name {', '.join(twice)} twice")
        return self

    def _check_privacy(self) -> None:
        """Check that the rest of the job keeps what ``privacy`` promises."""
        mode = self.privacy.mode
        if mode == "off":
            return
        for key, value, needed in (
            ("aggregation.weighting", self.aggregation.weighting, "uniform"),
            ("training.amp", self.training.amp, "off"),
            ("training.gradient_clip", self.training.gradient_clip, None),
            ("model.local_normalisation", self.model.local_normalisation, False),
            ("aggregation.secure", self.aggregation.secure, True),
        ):
            if value != needed:
                wanted = "to be left out" if needed is None else f"= {json.dumps(needed)}"
                raise ValueError(f"privacy.mode = {mode!r} needs {key} {wanted}")
        if mode == "local":
            return
        if self.secure_aggregation.level != "sum":
            raise ValueError(
                "privacy.mode = 'distributed' needs secure_aggregation.level = \"sum\": at the others the "
                "server learns something of each site's input, which holds a share of the noise only"
            )
        if self.training.steps != 1:
            raise ValueError("privacy.mode = 'distributed' needs training.steps = 1: a round is one gradient")

    def public(self) -> "Job":
        """Return the job without the paths of the researcher's machine: the part that is sent to sites."""
        return self.model_copy(update={"data": None})

    def to_json(self) -> str:
        """Return the public part as canonical JSON: sorted keys, no spaces."""
        return json.dumps(self.public().model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    def digest(self) -> str:
        """Return the SHA-256 of ``to_json`` in hexadecimal: what a run and its messages are bound to."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def _nearest_key(model: type[BaseModel], location: tuple[int | str, ...]) -> str:
    """Return the declared key nearest to the unknown one at ``location``, or ''."""
    section: type[BaseModel] = model
    for step in location[:-1]:
        annotation = section.model_fields[str(step)].annotation if isinstance(step, str) else None
        for option in (annotation, *getattr(annotation, "__args__", ())):
            if isinstance(option, type) and issubclass(option, BaseModel):
                section = option
    matches = difflib.get_close_matches(str(location[-1]), section.model_fields, n=1, cutoff=0.5)
    return matches[0] if matches else ""


def explain(error: ValidationError, model: type[BaseModel], source: str) -> ConfigError:
    """Turn pydantic's findings into one line that names the file, the key and what was expected.

    Args:
        error: What pydantic found; the first finding is told, the rest are counted.
        model: The model that was validated, for the nearest key.
        source: The file, as the user named it.
    """
    findings = error.errors()
    first = findings[0]
    location = tuple(first["loc"])
    key = ".".join(str(part) for part in location if part != "function-after")
    if first["type"] == "extra_forbidden":
        nearest = _nearest_key(model, location)
        text = f"{source}: unknown key `{key}`"
        hint = f"did you mean `{nearest}`?" if nearest else "see docs/reference/job-file.md for every key"
    elif first["type"] == "missing":
        text, hint = f"{source}: `{key}` is missing", "`fedvision init` writes a complete file with comments"
    else:
        reason = first["msg"].removeprefix("Value error, ")
        got = "" if isinstance(first["input"], dict) else f", got {first['input']!r}"
        where = f"`{key}`: " if key else ""
        text, hint = f"{source}: {where}{reason[0].lower()}{reason[1:]}{got}", ""
    if len(findings) > 1:
        text += f" (and {len(findings) - 1} more)"
    return ConfigError(text, hint)


def parse_job(content: dict[str, Any], source: str) -> Job:
    """Validate a parsed job file.

    Raises:
        ConfigError: A key is unknown, missing or out of range; the message names it and ``source``.
    """
    try:
        return Job.model_validate(content)
    except ValidationError as error:
        raise explain(error, Job, source) from None


def load_job(path: Path) -> Job:
    """Read a job file. A relative ``data.root`` is taken from the folder of the file.

    Raises:
        ConfigError: The file is absent, not TOML, or does not validate.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {(error.strerror or str(error)).lower()}",
            "`fedvision init` writes a job file",
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    job = parse_job(content, str(path))
    if job.data is None:
        return job
    paths = {"root": (path.parent / job.data.root).resolve()}
    if job.data.root_set is not None:
        paths["root_set"] = (path.parent / job.data.root_set).resolve()
    return job.model_copy(update={"data": job.data.model_copy(update=paths)})


def dump_job(job: Job) -> str:
    """Return the resolved job as TOML that ``load_job`` reads back to the same job."""
    return tomli_w.dumps(job.model_dump(mode="json", exclude_none=True))
