"""Where an output comes from: its description in Croissant 1.1 (croissant.json) and its data card (README.md), as pure functions.

Croissant: https://docs.mlcommons.org/croissant/docs/croissant-spec-1.1.html; what it says of provenance (section "Using External
Vocabularies") is followed with PROV-O: the output `prov:wasGeneratedBy` the selection, which `prov:used` the log, and `prov:wasDerivedFrom`
its streams. Only what the log, its run.json and the settings say is stated: no clock, no path of the output, and a licence or language
that nobody gave is unknown. What is written here is not checked again: the log's root and the shards' digests are how others can.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from udsstream.curate.columns import ADDED, Column
from udsstream.curate.formats import Compression, Format
from udsstream.curate.samples import SourceStream

__all__ = ["ALARMING_CORRELATION", "Origin", "Part", "Used", "croissant", "data_card"]

ALARMING_CORRELATION = 0.9
"""From here on, up or down, the card warns that the choice is close to one by length (the report's page draws the same line)."""

_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "arrayShape": "cr:arrayShape",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "containedIn": "cr:containedIn",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "description": {"@container": "@language"},
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isArray": "cr:isArray",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "name": {"@container": "@language"},
    "parentField": "cr:parentField",
    "path": "cr:path",
    "prov": "http://www.w3.org/ns/prov#",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
_MIME = {
    "mds": "https://docs.mosaicml.com/projects/streaming/en/stable/preparing_datasets/dataset_format.html",
    "webdataset": "application/x-tar",
    "parquet": "application/x-parquet",
    "jsonl": "application/jsonlines",
}
_HF_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_HF_SIZES += ((10_000_000, "1M<n<10M"), (100_000_000, "10M<n<100M"), (1_000_000_000, "100M<n<1B"))


@dataclass(frozen=True, kw_only=True)
class Used:
    """A source stream's part in an output."""

    stream: SourceStream
    index_sha256: str
    written: int
    """Samples of it in the output."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where an output comes from."""

    used: tuple[Used, ...]
    choice: Mapping[str, Any] | None = None
    """Settings of the choice; None: the streams as they are. The fields below are of the log, and None without one."""
    run_id: str | None = None
    created: str | None = None
    log_root: str | None = None
    """Merkle root, in hexadecimal, over the ranks' heads when the samples were chosen."""
    run_sha256: str | None = None
    """Of run.json."""
    last_step: int | None = None
    selection: Mapping[str, Any] | None = None
    """The run's selection settings."""
    model: str | None = None
    candidates: int | None = None
    offered: int | None = None
    ever_chosen: int | None = None
    length_correlation: float | None = None
    """Pearson correlation of score and tokens over the candidates that were scored."""

    @property
    def title(self) -> str:
        """A name that follows from what it is made of."""
        if self.run_id is not None:
            return f"curated-{_slug(self.run_id)[:32]}"
        return _slug("-".join(item.stream.name for item in self.used))[:60]

    @property
    def licences(self) -> list[str]:
        """What the streams are under, as far as anybody said; "unknown" among them where one is not."""
        return sorted({item.stream.licence for item in self.used if item.written})


@dataclass(frozen=True, kw_only=True)
class Part:
    """A finished file of the output."""

    name: str
    bytes: int
    sha256: str
    rows: int


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-") or "data"


# -- Croissant -------------------------------------------------------------------------------------------------------------


def croissant(
    origin: Origin,
    columns: Sequence[Column],
    parts: Sequence[Part],
    format: Format,
    compression: Compression,
    prefix: str,
) -> dict[str, Any]:
    """The description in Croissant 1.1, as a JSON object.

    `mlcroissant` reads the records of Parquet by it, and of JSON Lines (plain or gzip) unless a value is nested: for such it has no type.
    Of WebDataset it reads members of text, number and JSON; of MDS it knows files and fields.
    """
    files = [
        {
            "@type": "cr:FileObject",
            "@id": part.name,
            "name": part.name,
            "contentUrl": part.name,
            "contentSize": f"{part.bytes} B",
            "encodingFormat": _mime(format, compression),
            "sha256": part.sha256,
        }
        for part in parts
    ]
    sets, records = _contents(columns, parts, format, compression, prefix, ordered=origin.choice is not None)
    total = sum(part.rows for part in parts)
    described = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.1",
        "name": origin.title,
        "description": _sentence(origin, total),
        "version": "1.0.0",
        "size": f"{total} samples",
        "distribution": [*files, *sets],
        "recordSet": records,
        "isBasedOn": [_stream(item) for item in origin.used],
        "prov:wasDerivedFrom": [{"@id": _stream_id(item)} for item in origin.used],
    }
    if known := [licence for licence in origin.licences if licence != "unknown"]:
        described["license"] = known if len(known) > 1 else known[0]
    if origin.choice is not None:
        described["prov:wasGeneratedBy"] = _activity(origin)
    return described


def _mime(format: Format, compression: Compression) -> str:
    if format.name == "webdataset" and compression.kind == "gzip":
        return "application/gzip"
    return _MIME[format.name]


def _contents(
    columns: Sequence[Column],
    parts: Sequence[Part],
    format: Format,
    compression: Compression,
    prefix: str,
    *,
    ordered: bool,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The file sets, and the record sets whose fields are taken from them: one of all samples, or one for each member of WebDataset's."""
    total = sum(part.rows for part in parts)
    each = f"One record per sample, {total} in all, each once"
    each += ", in the order in which they were first chosen." if ordered else ", in the order of the stream."
    if format.name != "webdataset":
        pattern = f"{format.folder}/*" if format.folder else f"shard.*{format.suffixes[compression.kind]}"
        files = {
            "@type": "cr:FileSet",
            "@id": "shards",
            "name": "shards",
            "description": "The shards, in their order.",
            "encodingFormat": _MIME[format.name],
            "includes": pattern,
        }
        fields = [
            _field("samples", c, format, prefix, {"fileSet": {"@id": "shards"}, "extract": {"column": c.name}})
            for c in columns
        ]
        return [files], [_record_set("samples", each, fields)]

    from udsstream.curate.to_webdataset import member

    members: dict[str, list[Column]] = {}
    for column in columns:
        members.setdefault(member(column), []).append(column)
    sets, records = [], []
    for name, held in members.items():
        source = {"fileSet": {"@id": f"members-{name}"}}
        sets.append(
            {
                "@type": "cr:FileSet",
                "@id": f"members-{name}",
                "name": f"members-{name}",
                "description": f"The members KEY.{name}, one of each sample.",
                "containedIn": [{"@id": part.name} for part in parts],
                "encodingFormat": _member_mime(name),
                "includes": f"*.{name}",
            }
        )
        key = {
            "@type": "cr:Field",
            "@id": f"{name}/key",
            "name": "key",
            "description": "The sample's key: its id in 12 digits, the same in all members.",
            "dataType": "sc:Text",
            "source": source | {"extract": {"fileProperty": "filename"}, "transform": {"regex": "([0-9]+)\\..*"}},
        }
        fields = []
        for column in held:
            extract = {"jsonPath": f"$.{column.name}"} if column.added else {"fileProperty": "content"}
            fields.append(_field(name, column, format, prefix, source | {"extract": extract}))
        records.append(
            _record_set(name, f"{each} Its members KEY.{name}.", [key, *fields]) | {"key": {"@id": f"{name}/key"}}
        )
    return sets, records


def _record_set(name: str, description: str, fields: list[dict[str, Any]]) -> dict[str, Any]:
    return {"@type": "cr:RecordSet", "@id": name, "name": name, "description": description, "field": fields}


def _member_mime(name: str) -> str:
    kinds = {
        "txt": "text/plain",
        "json": "application/json",
        "jpg": "image/jpeg",
        "jpeg": "image/jpeg",
        "png": "image/png",
    }
    return kinds.get(name.rpartition(".")[2], "application/octet-stream")


def _field(records: str, column: Column, format: Format, prefix: str, source: dict[str, Any]) -> dict[str, Any]:
    kind = column.kind
    types = {
        "text": "sc:Text",
        "json": "sc:Text",
        "number": "sc:Text",
        "bytes": "sc:Text",
        "image list": "sc:ImageObject",
    }
    types |= dict.fromkeys(("jpeg", "png"), "sc:Text" if format.name == "jsonl" else "sc:ImageObject")
    base = {"int": "int64", "str_float": "float64"}.get(column.encoding, column.encoding)
    if kind == "array":
        base = column.dtype or "float64"
    croissant_type = types.get(kind) or "cr:" + base.replace("uint", "UInt").replace("int", "Int").replace(
        "float", "Float"
    )
    meaning = f"Encoding in MDS: {column.encoding}."
    if column.added:
        meaning = ADDED[column.name[len(prefix) :]][1].capitalize() + "."
    elif kind == "json":
        meaning += " A JSON value." if format.name == "jsonl" else " A JSON value, as text."
    elif format.name == "jsonl" and kind in ("bytes", "jpeg", "png"):
        meaning += ' Bytes, as {"base64": "…"}.'
        source = source | {"transform": {"jsonPath": "$.base64"}}
    elif format.name == "jsonl" and kind == "array" and not column.fixed_dtype:
        meaning += ' Arrays of any type, as {"dtype": …, "values": […]}.'
        source = source | {"transform": {"jsonPath": "$.values"}}
    field: dict[str, Any] = {
        "@type": "cr:Field",
        "@id": f"{records}/{column.name}",
        "name": column.name,
        "description": meaning,
        "dataType": croissant_type,
        "source": source,
    }
    if kind == "array" and column.shape is not None:
        field |= {"isArray": True, "arrayShape": ",".join(map(str, column.shape))}
    return field


def _stream_id(item: Used) -> str:
    return f"urn:udsstream:index:sha256:{item.index_sha256}"


def _stream(item: Used) -> dict[str, Any]:
    described = {
        "@type": ["sc:CreativeWork", "prov:Entity"],
        "@id": _stream_id(item),
        "name": item.stream.name,
        "identifier": f"sha256:{item.index_sha256}",
        "prov:atLocation": item.stream.location,
        "description": "MDS stream; its index.json has this SHA-256 and lists every shard. "
        f"{item.written} of its samples are in this data set.",
    }
    if item.stream.licence != "unknown":
        described["license"] = item.stream.licence
    if item.stream.date != "unknown":
        described["dateCreated"] = item.stream.date
    return described


def _activity(origin: Origin) -> dict[str, Any]:
    values: list[tuple[str, Any]] = [(f"choice.{name}", value) for name, value in (origin.choice or {}).items()]
    values += [(f"selection.{name}", value) for name, value in (origin.selection or {}).items()]
    values += [("model", origin.model), ("candidates", origin.candidates), ("samples offered", origin.offered)]
    values += [
        ("samples ever chosen", origin.ever_chosen),
        ("correlation of score and length", origin.length_correlation),
    ]
    log = {
        "@type": "prov:Entity",
        "@id": f"urn:udsstream:log:{origin.log_root}",
        "name": "selection log",
        "identifier": [f"merkle-root:{origin.log_root}", f"run.json-sha256:{origin.run_sha256}"],
        "description": f"The Merkle root over the heads of the ranks' chains, after step {origin.last_step} "
        "(docs/log_format.md of udsstream).",
    }
    activity: dict[str, Any] = {
        "@type": "prov:Activity",
        "@id": f"urn:udsstream:run:{origin.run_id}",
        "name": "data selection by udsstream",
        "prov:used": log,
        "additionalProperty": [
            {
                "@type": "sc:PropertyValue",
                "name": name,
                "value": value if isinstance(value, (str, int, float)) else json.dumps(value),
            }
            for name, value in values
            if value is not None
        ],
    }
    if origin.created is not None:
        activity["prov:startedAtTime"] = origin.created
    return activity


def _sentence(origin: Origin, total: int) -> str:
    names = ", ".join(item.stream.name for item in origin.used[:8]) + (
        f" and {len(origin.used) - 8} more" if len(origin.used) > 8 else ""
    )
    if origin.choice is None:
        return f"All {total} samples of the stream {names}."
    return (
        f"{total} samples of {origin.offered} that were offered from {names}, as the run {origin.run_id} chose them "
        f"({_choice_in_words(origin.choice)})."
    )


def _choice_in_words(choice: Mapping[str, Any]) -> str:
    times = choice["times"]
    words = ["chosen at least once" if times == 1 else f"chosen at least {times} times" if times else "chosen or not"]
    if choice.get("last_epoch"):
        words.append("in the last epoch")
    if "until" in choice:
        words.append(f"before step {choice['until']}")
    if "top_quantile" in choice:
        words.append(f"among the best {choice['top_quantile']} by mean score")
    if "only" in choice:
        words.append(f"only from {', '.join(choice['only'])}")
    words += [f"at most {number} of {name}" for name, number in choice.get("quotas", {}).items()]
    words += [f"at most {share} of the output from {name}" for name, share in choice.get("shares", {}).items()]
    return ", ".join(words)


# -- the data card ---------------------------------------------------------------------------------------------------------


def data_card(
    origin: Origin,
    columns: Sequence[Column],
    parts: Sequence[Part],
    format: Format,
    compression: Compression,
    *,
    prefix: str,
    language: Sequence[str] = (),
) -> str:
    """README.md, with the front matter that the Hugging Face Hub reads."""
    total = sum(part.rows for part in parts)
    size = next((name for limit, name in _HF_SIZES if total < limit), "n>1B")
    licences = origin.licences
    licence = licences[0] if len(licences) == 1 else "unknown" if "unknown" in licences else "other"
    front = ["---", f"license: {_yaml(licence)}"]
    if licence == "other":
        front.append(f"license_name: {_yaml(', '.join(licences))}")
    if language:
        front += ["language:", *(f"- {_yaml(item)}" for item in language)]
    front += [f"pretty_name: {_yaml(origin.title)}", "size_categories:", f"- {size}", "tags:", "- udsstream"]
    if format.name != "mds":
        front += ["configs:", "- config_name: default", "  data_files:", "  - split: train"]
        front.append(f"    path: {_yaml(format.folder + '/*' + format.suffixes[compression.kind])}")
    front.append("---")
    body = [f"# {origin.title}", "", _sentence(origin, total), ""]
    body += _made_of(origin)
    body += _chosen_by(origin, total, prefix, columns)
    body += ["## Columns", "", "| column | MDS encoding | |", "|---|---|---|"]
    for column in columns:
        meaning = ADDED[column.name[len(prefix) :]][1] if column.added else ""
        body.append(f"| `{_cell(column.name)}` | `{column.encoding}` | {meaning} |")
    body += ["", "## Loading", "", *_loading(format, compression), ""]
    amount = sum(part.bytes for part in parts)
    body += [
        f"{len(parts):,} shard{'s' if len(parts) != 1 else ''}, {amount:,} bytes; sizes and SHA-256 of each are in `croissant.json` "
        "(Croissant 1.1), with all of the above in a form for machines.",
        "",
    ]
    return "\n".join([*front, "", *body])


def _made_of(origin: Origin) -> list[str]:
    rows = [
        f"| {_cell(item.stream.name)} | {_cell(item.stream.location)} | {item.written:,} | {_cell(item.stream.licence)} | "
        f"{_cell(item.stream.date)} | `{item.index_sha256}` |"
        for item in origin.used
    ]
    header = [
        "| stream | location | samples here | licence | date | SHA-256 of its index |",
        "|---|---|---:|---|---|---|",
    ]
    note = []
    if "unknown" in origin.licences:
        note = ["", "A licence that reads *unknown* was not recorded: find out before you pass the data on."]
    return ["## What it is made of", "", *header, *rows, *note, ""]


def _chosen_by(origin: Origin, total: int, prefix: str, columns: Sequence[Column]) -> list[str]:
    if origin.choice is None:
        return []
    selection = dict(origin.selection or {})
    method = selection.get("method", "unknown")
    out = [
        "## How it was chosen",
        "",
        f"The run scored batches of candidates with a model ({origin.model or 'unknown'}) and chose from each by the method `{method}`. "
        f"Its {origin.candidates:,} candidates were {origin.offered:,} different samples, of which {origin.ever_chosen:,} were chosen at "
        f"least once. This data set holds {total:,}, those {_choice_in_words(origin.choice)}; each once, in the order in which they were "
        f"first chosen{', those that never were at the end' if origin.choice['times'] == 0 else ''}.",
        "",
        f"* run `{origin.run_id}`, begun {origin.created or 'at an unknown time'}",
        f"* log root `{origin.log_root}` (after step {origin.last_step}), SHA-256 of run.json `{origin.run_sha256}`",
        f"* settings of the choice: `{json.dumps(dict(origin.choice), sort_keys=True)}`",
        f"* settings of the selection: `{json.dumps(selection, sort_keys=True)}`",
        "",
    ]
    correlation = origin.length_correlation
    if correlation is not None and abs(correlation) >= ALARMING_CORRELATION:
        longest = "longest" if correlation > 0 else "shortest"
        out += [
            f"**Caveat.** In this run score and length have a correlation of {correlation:+.2f}: the choice is close to taking the "
            f"{longest} samples. Compare with a choice by length before you credit the score.",
            "",
        ]
    elif correlation is not None:
        out += [f"Score and length have a correlation of {correlation:+.2f} in this run.", ""]
    if any(column.added for column in columns):
        out += [
            f"Scores (`{prefix}score`, `{prefix}intra`, `{prefix}inter`) are those of a sample's first turn, made by the model as it was "
            "then; they are comparable within a step, less so between steps that are far apart.",
            "",
        ]
    return out


def _loading(format: Format, compression: Compression) -> list[str]:
    suffix = format.suffixes[compression.kind]
    if format.name == "mds":
        return [
            "```python",
            "from streaming import StreamingDataset",
            "dataset = StreamingDataset(local='.', batch_size=1)",
            "```",
        ]
    if format.name == "webdataset":
        return [
            "```python",
            "import glob, webdataset",
            f"dataset = webdataset.WebDataset(sorted(glob.glob('data/*{suffix}')), shardshuffle=False).decode()",
            "```",
        ]
    kind = {"parquet": "parquet", "jsonl": "json"}[format.name]
    lines = [
        "```python",
        "import datasets",
        f"dataset = datasets.load_dataset('{kind}', data_files='data/*{suffix}', split='train')",
        "```",
    ]
    read = {"parquet": "read_parquet", "jsonl": "read_json_auto"}[format.name]
    return [*lines, "", "```sql", f"-- DuckDB\nSELECT * FROM {read}('data/*{suffix}') LIMIT 5;", "```"]


def _yaml(text: str) -> str:
    """A scalar that YAML reads as this text."""
    return (
        text if re.fullmatch(r"[A-Za-z][A-Za-z0-9._-]*", text) and text.lower() not in _YAML_WORDS else json.dumps(text)
    )


_YAML_WORDS = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")
