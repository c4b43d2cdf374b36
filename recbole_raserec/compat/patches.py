"""Patches for RecBole 1.2.1 on today's torch, numpy, pandas, scipy and setuptools.

This is the only module that knows how RecBole breaks. Each patch is one small function; its docstring is the reason.
"""

from __future__ import annotations

import builtins
import contextlib
import csv
import enum
import functools
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import pickle
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from packaging.version import Version

from recbole_raserec.compat.import_hooks import View, patch, replace_function
from recbole_raserec.errors import ConfigError

_DATASET = "recbole.data.dataset.dataset"
_QUICK_START = "recbole.quick_start.quick_start"
_TRAINER = "recbole.trainer.trainer"
_GENERAL = "recbole.model.general_recommender."
_SEQUENTIAL = "recbole.model.sequential_recommender."


def _at_least(distribution: str, version: str) -> bool:
    return Version(importlib.metadata.version(distribution)) >= Version(version)


@patch("numpy-names", "numpy", needed=lambda: _at_least("numpy", "2"))
def _numpy_names(module: Any) -> None:
    """numpy 2 removed the names bool8 (ray 2.6 uses it at import) and float_, complex_, unicode_ (RecBole's Config uses
    them). They are given back."""
    for old, new in {"bool8": "bool_", "float_": "float64", "complex_": "complex128", "unicode_": "str_"}.items():
        vars(module).setdefault(old, getattr(module, new))


@patch("numpy-aliases", "recbole.evaluator.metrics", needed=lambda: _at_least("numpy", "1.20"))
def _numpy_aliases(module: Any) -> None:
    """RecBole's metrics use np.float and np.bool, which RecBole's Config puts into numpy; needed without one too."""
    module.np = View(module.np, float=module.np.float64, bool=module.np.bool_)


def _without_pkg_resources() -> bool:
    return "pkg_resources" not in sys.modules and importlib.util.find_spec("pkg_resources") is None


@patch("pkg-resources", "ray", "ray.tune", needed=_without_pkg_resources, around=True)
def _pkg_resources() -> Iterator[None]:
    """ray 2.6 imports pkg_resources, which setuptools 82 removed and the versions before it warn about. ray asks it for
    the version of numpy and for the module `packaging`; a stand-in answers while ray is imported, and no other module
    sees it."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
        warnings.filterwarnings("ignore", message="`np.bool8` is a deprecated alias")
        if _without_pkg_resources():
            import packaging.version

            stand_in: Any = types.ModuleType("pkg_resources", "A stand-in while ray is imported.")
            stand_in.get_distribution = importlib.metadata.distribution
            stand_in.DistributionNotFound = importlib.metadata.PackageNotFoundError
            stand_in.packaging = packaging
            sys.modules["pkg_resources"] = stand_in
            stack.callback(sys.modules.pop, "pkg_resources", None)
        yield


def _without_ray() -> bool:
    return "ray" not in sys.modules and importlib.util.find_spec("ray") is None


@patch("no-ray", _QUICK_START, needed=_without_ray, around=True)
def _no_ray() -> Iterator[None]:
    """RecBole's quick start imports ray 2.6, which has no wheel for Python 3.12 or later, to report the figures of its
    own tuning. Where there is no ray, a stand-in whose report does nothing takes its place during this one import, and
    no other module sees it."""
    import recbole.data.transform  # what quick start imports beside ray: none of it is to meet the stand-in
    import recbole.utils  # noqa: F401

    with contextlib.ExitStack() as stack:
        if _without_ray():
            stand_in: Any = types.ModuleType("ray", "A stand-in while RecBole's quick start is imported.")
            stand_in.tune = types.SimpleNamespace(report=lambda **figures: None)
            sys.modules["ray"] = stand_in
            stack.callback(sys.modules.pop, "ray", None)
        yield


def _torch_view() -> types.ModuleType:
    import torch

    return View(torch, load=load_checkpoint)


_LOADING = (_TRAINER, *(_GENERAL + name for name in ("convncf", "nais", "neumf", "ract")), _SEQUENTIAL + "s3rec")


@patch("torch-load", *_LOADING)
def _torch_load(module: Any) -> None:
    """Since torch 2.6, torch.load refuses the Config that RecBole's Trainer stores in its checkpoints, so evaluation
    fails when the training is done. RecBole's modules, and they alone, see a torch.load that reads what RecBole writes
    and refuses every other pickled object."""
    module.torch = _torch_view()


@patch("load-data-and-model", _QUICK_START)
def _load_data_and_model(module: Any) -> None:
    """As torch-load, for load_data_and_model of RecBole's quick start, which imports torch inside the function."""

    def import_(name: str, *args: Any, **kwargs: Any) -> Any:
        return _torch_view() if name == "torch" else builtins.__import__(name, *args, **kwargs)

    old = module.load_data_and_model
    # The same function, over the same globals; a function takes its builtins from there when it is made.
    module.__builtins__ = {**vars(builtins), "__import__": import_}
    new = types.FunctionType(old.__code__, vars(module), old.__name__, old.__defaults__, old.__closure__)
    functools.update_wrapper(new, old)
    replace_function(old, lambda _: new)


def _new_hyperopt() -> bool:
    return importlib.util.find_spec("hyperopt") is not None and _at_least("hyperopt", "0.2.6")


@patch("hyperopt-generator", "recbole.trainer.hyper_tuning", needed=_new_hyperopt)
def _hyperopt_generator(module: Any) -> None:
    """Since hyperopt 0.2.6 a search draws from numpy's Generator; RecBole's exhaustive search gives it a RandomState,
    which has no such methods. In RecBole's module a Generator takes its place."""
    numpy = module.np
    module.np = View(numpy, random=View(numpy.random, RandomState=numpy.random.default_rng))


@patch("ensure-dir", "recbole.utils.utils")
def _ensure_dir(module: Any) -> None:
    """RecBole bug: it looks whether a directory is there and then makes it, which fails if another process made it in
    between."""

    def ensure_dir(dir_path: str) -> None:
        try:
            os.makedirs(dir_path, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            problem = "RecBole needs a directory of this name; move the file, or start elsewhere"
            raise ConfigError([f"{os.path.abspath(dir_path)}: {problem}"]) from None

    replace_function(module.ensure_dir, lambda _: ensure_dir)


@patch("log-folder", "recbole.utils.logger")
def _log_folder(module: Any) -> None:
    """RecBole logs into log/ of the working directory, names the file after the model, colours its texts whatever reads
    them, and logs a second run into the file of the first. With a configuration of this package the file lies below its
    `log_folder`, a model of one's own has the name of its class, and each run has its file. Colours are for terminals;
    with NO_COLOR there are none."""
    original, colour = module.init_logger, module.set_color

    def init_logger(config: Any) -> None:
        root, plain = logging.getLogger(), module.RemoveColorFilter()
        if not hasattr(config, "log_folder"):
            return original(config)
        for handler in [handler for handler in root.handlers if handler.name == "recbole_raserec"]:
            root.removeHandler(handler)
            handler.close()
        if root.handlers:
            return None  # the program has its own
        name = re.split("[.:]", config["model"])[-1]
        values = "".join(map(str, config.final_config_dict.values()))
        mark, folder = hashlib.md5(values.encode(), usedforsecurity=False).hexdigest()[:6], config.log_folder / "log"
        module.ensure_dir(str(folder / name))
        path = folder / name / f"{name}-{config['dataset']}-{module.get_local_time()}-{mark}.log"
        file, screen = logging.FileHandler(path, encoding="utf-8", delay=True), logging.StreamHandler()
        line = "%(asctime)-15s %(levelname)s  %(message)s"
        file.setFormatter(logging.Formatter(line, "%a %d %b %Y %H:%M:%S"))
        file.addFilter(plain)
        colours = {"log_colors": module.log_colors_config}
        screen.setFormatter(module.colorlog.ColoredFormatter(f"%(log_color)s{line}", "%d %b %H:%M", **colours))
        if os.environ.get("NO_COLOR") or not getattr(screen.stream, "isatty", bool)():
            screen.setFormatter(logging.Formatter(line, "%d %b %H:%M"))
            screen.addFilter(plain)
        elif os.name == "nt":
            module.init()  # colours on a console of Windows
        for handler in (screen, file):
            handler.name = "recbole_raserec"
        logging.basicConfig(level=str(config["state"] or "info").upper(), handlers=[screen, file])

    def set_color(log: Any, color: Any, highlight: bool = True) -> str:
        return str(log) if os.environ.get("NO_COLOR") else colour(log, color, highlight)

    module.init_logger, module.set_color = init_logger, set_color


class Later:
    """What `make` returns, made when it is first used."""

    def __init__(self, make: Callable[[], Any]):
        self._make = functools.cache(make)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._make(), name)


@patch("tensorboard-later", _TRAINER)
def _tensorboard_later(module: Any) -> None:
    """RecBole's Trainer makes a folder log_tensorboard/ in the working directory even if nothing is written to it; here
    it is made when something is."""
    make = module.get_tensorboard
    module.get_tensorboard = lambda logger: Later(lambda: make(logger))


@patch("torch-grad-scaler", _TRAINER, needed=lambda: _at_least("torch", "2.4"))
def _grad_scaler(module: Any) -> None:
    """torch 2.4 deprecated torch.cuda.amp.GradScaler, which RecBole's Trainer makes (and torch warns about) in every
    epoch. The Trainer gets its successor, torch.amp.GradScaler."""
    import torch

    module.amp = View(module.amp, GradScaler=functools.partial(torch.amp.GradScaler, "cuda"))


#: Globals that RecBole's checkpoints may name, RecBole's own classes apart.
_PLAIN = frozenset(
    {
        "_codecs.encode", "builtins.set", "builtins.slice", "collections.OrderedDict", "collections.defaultdict",
        "logging.getLogger", "numpy.dtype", "numpy.matrix", "numpy.ndarray", "numpy._core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar", "numpy.core.multiarray._reconstruct", "numpy.core.multiarray.scalar",
        "pathlib.PosixPath", "pathlib.WindowsPath", "torch.Size", "torch.device", "torch.serialization._get_layout",
        "torch._utils._rebuild_parameter", "torch._utils._rebuild_sparse_tensor", "torch._utils._rebuild_tensor_v2",
        "yaml.loader.FullLoader",  # an attribute of RecBole's Config
    }
)  # fmt: skip


class CheckpointUnpickler(pickle.Unpickler):
    """Knows the globals that RecBole's checkpoints name: plain values, tensors, arrays, RecBole's classes.

    Raises:
        pickle.UnpicklingError: the file names any other global.
    """

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in _PLAIN:
            return super().find_class(module, name)
        # No import by a name found in a file: importing a module runs it.
        if module in sys.modules or module.startswith(("recbole.", "recbole_raserec.", "scipy.sparse.")):
            found = super().find_class(module, name)
            if _is_written_by_recbole(found):
                return found
        raise pickle.UnpicklingError(
            f"The checkpoint names {module}.{name}, which is neither a value nor a class that RecBole writes. "
            f"If you trust where the file comes from, read it with torch.load(file, weights_only=False)."
        )


def _is_written_by_recbole(found: Any) -> bool:
    import torch
    from recbole.config import Config
    from recbole.model.abstract_recommender import AbstractRecommender
    from scipy.sparse import spmatrix

    if not isinstance(found, type):
        return isinstance(found, (torch.dtype, torch.layout))
    # DIN, FDSA, SASRecF, ... store their embedding layers whole, some with the data set these were made for.
    own = found.__module__.startswith(("recbole.", "recbole_raserec.", "torch.nn.modules."))
    return own or issubclass(found, (Config, AbstractRecommender, enum.Enum, spmatrix))


def load_checkpoint(file: Any, map_location: Any = None, **options: Any) -> Any:
    """torch.load for a checkpoint of RecBole's Trainer; with `weights_only` or `pickle_module` it is torch.load itself.

    `file` may also be a checkpoint directory of this package (S3Rec's and RaCT's `pre_model_path`); of its weights,
    {"state_dict": tensors} is returned. The file of a model of RecBole's own names that one also where its name is that
    of one of this package.

    Raises:
        pickle.UnpicklingError: the file names a global that no checkpoint of RecBole names.
    """
    import torch

    if isinstance(file, (str, os.PathLike)) and os.path.isdir(file):
        from recbole_raserec.storage import read_tensors

        return {"state_dict": read_tensors(os.path.join(file, "model.safetensors"))[0]}
    if options.get("weights_only") is None and options.get("pickle_module") is None:
        reader: Any = types.ModuleType("recbole_checkpoint_pickle")
        reader.__dict__.update(vars(pickle), Unpickler=CheckpointUnpickler)
        reader.load = lambda file, **more: CheckpointUnpickler(file, **more).load()  # torch < 1.6: a row of pickles
        options.update(weights_only=False, pickle_module=reader)
    found = torch.load(file, map_location, **options)
    config: Any = found.get("config") if isinstance(found, dict) else None
    if hasattr(config, "model_class"):
        from recbole_raserec.config import name_of, recbole_name

        config["model"] = (name_of if hasattr(config, "training_options") else recbole_name)(config.model_class)
    return found


@patch("pandas-fillna", _DATASET)
def _pandas_fillna(module: Any) -> None:
    """RecBole fills missing values by feat[field].fillna(..., inplace=True): deprecated since pandas 2.2, and without
    effect in pandas 3. They are filled in the data frame before RecBole tries to, and the warning is silenced."""
    import pandas as pd

    dataset, kinds = module.Dataset, module.FeatureType
    fill_nan, from_scratch = dataset._fill_nan, dataset._from_scratch

    @functools.wraps(fill_nan)
    def _fill_nan(self: Any) -> None:
        for name in self.feat_name_list:
            feat = getattr(self, name)
            zero = {field: 0 for field in feat if self.field2type[field] == kinds.TOKEN}
            mean = {field: feat[field].mean() for field in feat if self.field2type[field] == kinds.FLOAT}
            setattr(self, name, feat.fillna({**zero, **mean}))
        fill_nan(self)

    def read_csv(*args: Any, **options: Any) -> Any:
        csv.field_size_limit(2**31 - 1)  # of RecBole's engine: 131,072 signs, less than some descriptions have
        frame = pd.read_csv(*args, **options)
        # The header of an atomic file names the type of each column: "class:token_seq".
        return frame.fillna({name: "" for name in frame.columns if str(name).endswith("_seq")})

    @functools.wraps(from_scratch)
    def _from_scratch(self: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="A value is (trying to be|being) set on a copy")
            warnings.filterwarnings("ignore", message="The inplace keyword in .* is deprecated")  # pandas 3.1
            warnings.filterwarnings("ignore", message="using <.*> in Series.agg cannot aggregate")
            from_scratch(self)

    dataset._fill_nan, dataset._from_scratch = _fill_nan, _from_scratch
    module.pd = View(pd, read_csv=read_csv)


@patch("pandas-read-only", _DATASET, needed=lambda: _at_least("pandas", "3"))
def _pandas_read_only(module: Any) -> None:
    """RecBole makes its tensors of the arrays in a data frame, without a copy where the types agree. Those of pandas 3
    are read-only; torch warns, and a write to the tensor would reach the frame. In RecBole's module they are copied."""
    import torch

    def copied(kind: Any) -> Any:
        return lambda data: kind(data if getattr(data, "flags", None) is None or data.flags.writeable else data.copy())

    module.torch = View(torch, LongTensor=copied(torch.LongTensor), FloatTensor=copied(torch.FloatTensor))


@patch("missing-ids", _DATASET)
def _missing_ids(module: Any) -> None:
    """RecBole drops interactions without a user, then those without an item, by labels that it takes for positions:
    where both occur it drops the wrong rows, or fails. They are dropped before RecBole looks."""
    dataset = module.Dataset
    filter_nan = dataset._filter_nan_user_or_item

    @functools.wraps(filter_nan)
    def _filter_nan_user_or_item(self: Any) -> None:
        fields = [field for field in (self.uid_field, self.iid_field) if field in self.inter_feat]
        missing = self.inter_feat[fields].isna().any(axis=1)
        if missing.any():
            first, count, names = missing.to_numpy().argmax() + 1, missing.sum(), " or no ".join(fields)
            self.logger.warning(f"{count} interactions have no {names} and are left out (the first is number {first}).")
            self.inter_feat = self.inter_feat[~missing].reset_index(drop=True)
        filter_nan(self)

    dataset._filter_nan_user_or_item = _filter_nan_user_or_item


@patch("pandas-agg-len", _DATASET, needed=lambda: _at_least("pandas", "3"))
def _pandas_agg_len(module: Any) -> None:
    """RecBole takes the lengths of the sequences in a column by feat[field].agg(len); pandas 3 answers with the length
    of the column. In RecBole's module (which calls it on no other Series) len of a Series is the lengths."""
    import pandas as pd

    module.len = lambda value: value.map(len) if isinstance(value, pd.Series) else len(value)


@patch("scipy-dok-update", "recbole.model.abstract_recommender", needed=lambda: _at_least("scipy", "1.13"))
def _dok_update(_: Any) -> None:
    """RecBole's graph models (GCMC, LightGCN, NCL, NGCF, SpectralCF, ...) fill their adjacency matrix by
    dok_matrix._update, a private method that scipy 1.13 removed. It is given back: one unchecked dict update."""
    from scipy.sparse import dok_matrix

    if not hasattr(dok_matrix, "_update"):
        dok_matrix._update = lambda self, data: self._dict.update(data)


@patch("collector-counts", "recbole.evaluator.collector")
def _collector_counts(module: Any) -> None:
    """RecBole bug: at the end of an evaluation its Collector moves all that it holds to the CPU, the number of items
    and the counts of each too, an int and a Counter, which have no such method. So ItemCoverage, GiniIndex,
    AveragePopularity and TailPercentage fail. These are put aside meanwhile."""
    collect = module.Collector.get_data_struct

    @functools.wraps(collect)
    def get_data_struct(self: Any) -> Any:
        held = self.data_struct._data_dict
        counts = {name: held.pop(name) for name in list(held) if not hasattr(held[name], "cpu")}
        found = collect(self)
        held.update(counts)
        found._data_dict.update(counts)
        return found

    module.Collector.get_data_struct = get_data_struct


@patch("cpr-predict", _SEQUENTIAL + "gru4reccpr", _SEQUENTIAL + "sasreccpr")
def _cpr_predict(module: Any) -> None:
    """GRU4RecCPR and SASRecCPR end predict in `assert False` for being slow; run_recbole calls it (to count the
    operations), and so does every evaluation on sampled items. The scores are taken from full_sort_predict."""

    def predict(self: Any, interaction: Any) -> Any:
        scores = self.full_sort_predict(interaction)  # [batch, items]
        return scores.gather(1, interaction[self.ITEM_ID].unsqueeze(1)).squeeze(1)  # [batch]

    for name in ("GRU4RecCPR", "SASRecCPR"):
        if hasattr(module, name):
            getattr(module, name).predict = predict


@patch("ksr-dtype", _SEQUENTIAL + "ksr")
def _ksr_dtype(module: Any) -> None:
    """KSR multiplies its float32 memory with the relation vectors as numpy read them, in float64, which torch refuses.
    The vectors are cast when the model is made."""
    init = module.KSR.__init__

    @functools.wraps(init)
    def __init__(self: Any, config: Any, dataset: Any) -> None:
        init(self, config, dataset)
        self.relation_Matrix = self.relation_Matrix.float()

    module.KSR.__init__ = __init__


@patch("sine-anomaly", _SEQUENTIAL + "sine")
def _sine_anomaly(module: Any) -> None:
    """RecBole bug: SINE's module turns torch's anomaly detection on for the whole process, and importing any sequential
    model imports it. Every backward pass then looks for NaN after each operation and records stack traces. It is a
    debugging aid that costs up to a third of a training step; it can be turned on again."""
    import torch

    torch.autograd.set_detect_anomaly(False)


def _over_items(x: Any, weight: Any, bias: Any) -> Any:
    """A convolution whose kernels [o, 1, k, D] are as wide as `x` [b, 1, L, D], as one over L with D channels."""
    import torch.nn.functional as F

    rows, kernels = x.squeeze(1).transpose(1, 2), weight.squeeze(1).transpose(1, 2)  # [b, D, L], [o, D, k]
    return F.conv1d(rows, kernels, bias).unsqueeze(3)  # [b, o, L - k + 1, 1]


@patch("caser-gradient", _SEQUENTIAL + "caser")
def _caser_gradient(module: Any) -> None:
    """oneDNN bug (3.12, in torch 2.13, with AVX-512): the gradient of a kernel as wide as its input is wrong for widths
    of 14 to 19 and more than 28 rows. It holds what lies beside its buffers in memory, now and then NaN. Caser has such
    kernels at embedding_size 14 to 19; narrower than 32, the same sum is taken as a convolution in one dimension."""
    init = module.Caser.__init__

    @functools.wraps(init)
    def __init__(self: Any, config: Any, dataset: Any) -> None:
        init(self, config, dataset)
        if self.embedding_size < 32:
            for kernel in self.conv_h:
                kernel._conv_forward = _over_items

    module.Caser.__init__ = __init__
