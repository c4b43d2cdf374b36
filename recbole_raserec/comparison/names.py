"""What a run of a comparison is called: by the fingerprint of all that decides its figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recbole_raserec.configuration.options import RETRIEVAL_MODEL
from recbole_raserec.configuration.stage_options import regeneration_options, trains_regenerator
from recbole_raserec.configuration.text import plain
from recbole_raserec.data.source import inter_files
from recbole_raserec.evaluation.report import versions
from recbole_raserec.fileio import sha256
from recbole_raserec.fingerprint import MODEL_VERSIONS, fingerprint
from recbole_raserec.registry import MODELS
from recbole_raserec.serving.checkpoint import MANIFEST

#: Packages whose version decides a figure.
_VERSIONS = ("recbole_raserec", "recbole", "torch", "numpy", "faiss", "kernels")

#: Options that say what the figures mean: one value in an output directory, and one for each data set in it.
PROTOCOL = ("eval_args", "metrics", "topk")


def cell_name(config: Any, hashes: dict[tuple[str, ...], str]) -> str:
    """Name of a cell: model, data set, seed, and the fingerprint of the options, data and versions that decide it."""
    options: dict[str, Any] = {name: plain(config[name]) for name in PROTOCOL}
    options["training"] = config.training_options()
    models, parts = {config.model}, [_content(config, hashes)]
    if config.model == RETRIEVAL_MODEL:
        options["backbone"] = config.for_backbone().training_options()
        models.add(options["backbone"]["model"])
    if config["regeneration"]:
        options["regeneration"] = {name: plain(config[name]) for name in regeneration_options(config)}
        pretrained = trains_regenerator(config) and config["regen_pretrained"]
        options["embeddings"] = config.for_embeddings().training_options() if pretrained else None
        given = Path(config["regenerated_data"]) if config["regenerated_data"] else None
        parts += [sha256(path) for path in sorted(given.iterdir()) if path.is_file()] if given else []
    collaborative = config["collaborative"]
    if collaborative in MODELS:
        models.add(collaborative)
        options["collaborator"] = config.for_collaborator().training_options()
    elif collaborative and (Path(collaborative) / MANIFEST).is_file():
        parts.append(sha256(Path(collaborative) / MANIFEST))
    found = versions()
    options["versions"] = {name: found[name] for name in _VERSIONS}
    options["model_versions"] = {name: MODEL_VERSIONS.get(name) for name in sorted(models)}
    return f"{config.model}-{config['dataset']}-{config['seed']}-{fingerprint(options, *parts)[:12]}"


def _content(config: Any, hashes: dict[tuple[str, ...], str]) -> str:
    """Hash of the files that the run reads: interactions, and features where the model has some."""
    folder, dataset = Path(config["data_path"]), config["dataset"]
    paths = inter_files(folder, dataset, config["benchmark_filename"])
    suffixes = {*(config["load_col"] or ()), *(config["additional_feat_suffix"] or ())} - {"inter"}
    paths += [folder / f"{dataset}.{suffix}" for suffix in sorted(suffixes)]
    key = tuple(str(path) for path in paths if path.is_file())
    if key not in hashes:
        hashes[key] = fingerprint({Path(path).name: sha256(path) for path in key})
    return hashes[key]
