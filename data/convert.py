"""Convert an official RWKV-7 checkpoint to the int8 model.npz of nano_eggroll.py, in numpy: no torch is needed.

    python data/convert.py rwkv7.pth --vocab rwkv_vocab_v20230424.txt --out world.npz
    python nano_eggroll.py --load world.npz --sample "User: why is the sky blue?"

Reads .safetensors, and .pth of torch >= 1.6, of bfloat16 or floats, with official names or those of the
Hugging Face form. The World models need their vocabulary; a model of 256 tokens is one of bytes. A .pth holds a pickle,
which may name any function to be called: here a name means one of the six that tensors need, or the file is refused.
"""

import argparse
import ast
import contextlib
import io
import json
import pickle
import re
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import nano_eggroll as E

OTHER_FILE = "use a whole one with official names, .safetensors or .pth, as of huggingface.co/BlinkDL"
VOCAB_FILE = "give --vocab rwkv_vocab_v20230424.txt, which is in the PyPI package rwkv (pip download --no-deps rwkv)"

# ---------------------------------------------------------------------------------------------------------------------
# The tensors of a file

# bfloat16, which numpy has not, is the upper half of a float32
DTYPES = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8"}


class Unpickler(pickle.Unpickler):
    """Python's own, but a name in the file means an entry of `known`: nothing is imported, and nothing else called."""

    known: dict[str, Any]

    def find_class(self, module: str, name: str) -> Any:
        """What stands for module.name; raises ValueError if nothing does."""
        if f"{module}.{name}" not in self.known:
            raise ValueError(f"it asks for {module}.{name}, and not for bfloat16 or floats")
        return self.known[f"{module}.{name}"]

    def persistent_load(self, storage: Any) -> Any:
        """What stands for a storage is its description: ("storage", type, key, device, length)."""
        return storage


def read_pth(file: BinaryIO) -> dict[str, np.ndarray]:
    """Tensors by name of what torch.save wrote: a zip file of a pickle and of one entry for each storage."""
    archive = zipfile.ZipFile(file)
    root = next((n for n in archive.namelist() if n.endswith("data.pkl")), "data.pkl").removesuffix("data.pkl")
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        raise ValueError("its numbers are big-endian")

    def tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> np.ndarray:
        _, kind, key, _, length = storage
        flat = np.frombuffer(archive.read(f"{root}data/{key}"), DTYPES[kind])
        if any(type(n) is not int or n < 0 for n in (offset, *shape, *strides)) or len(flat) != length:
            raise ValueError(f"storage {key} is not what its tensor needs")
        # numpy checks this, too, but its own sum can overflow
        if offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) >= length:
            raise ValueError(f"a tensor reaches beyond its storage {key}")
        size = flat.itemsize
        return np.ndarray(shape, flat.dtype, flat, offset * size, [s * size for s in strides])

    unpickler = Unpickler(io.BytesIO(archive.read(f"{root}data.pkl")))
    unpickler.known = {
        "torch.BFloat16Storage": "BF16", "torch.HalfStorage": "F16", "torch.FloatStorage": "F32",
        "torch.DoubleStorage": "F64",
        "torch._utils._rebuild_tensor_v2": tensor, "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        "collections.OrderedDict": OrderedDict}
    tensors = unpickler.load()
    if not isinstance(tensors, dict) or not all(isinstance(t, np.ndarray) for t in tensors.values()):
        raise ValueError("it holds something else than tensors by name")
    return tensors


def read_safetensors(file: BinaryIO) -> dict[str, np.ndarray]:
    """Tensors by name: the file is the length of a header, the header (JSON), and the entries without gaps."""
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors, at = {}, 8 + length
    for name, t in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if t["dtype"] not in DTYPES:
            raise ValueError(f"{name} is {t['dtype']}, and none of {', '.join(DTYPES)}")
        tensors[name] = np.memmap(file, DTYPES[t["dtype"]], "r", at, tuple(t["shape"]))
        if t["data_offsets"] != [at - 8 - length, at - 8 - length + tensors[name].nbytes]:
            raise ValueError(f"{name} is not where it should be")
        at += tensors[name].nbytes
    if at != file.seek(0, io.SEEK_END):
        raise ValueError("it is longer than its header says")
    return tensors


# ---------------------------------------------------------------------------------------------------------------------
# An RWKV-7 of them, in int8

# What the Hugging Face form (flash-linear-attention) calls the parameters: a part of a name, and the official one
HUGGING_FACE = {r"^model\.embeddings": "emb", r"^model\.norm": "ln_out", r"^lm_head": "head",
                r"^model\.layers\.": "blocks.", r"\.pre_norm": ".ln0", r"\.attn_norm": ".ln1", r"\.ffn_norm": ".ln2",
                r"\.attn\.g_norm": ".att.ln_x", r"\.attn\.": ".att.", r"r_proj": "receptance", r"k_proj": "key",
                r"v_proj": "value", r"o_proj": "output", r"([wavg])_lora\.lora\.2\.bias": r"\g<1>0",
                r"([wavg])_lora\.lora\.0\.weight": r"\g<1>1", r"([wavg])_lora\.lora\.2\.weight": r"\g<1>2"}


def official(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same tensors with official names and order of axes, without what no RWKV-7 uses, of which a line is said."""
    found = {}
    for name, tensor in tensors.items():
        tensor = tensor.T if re.search(r"_lora\.lora\.[02]\.weight$", name) else tensor
        for old, new in HUGGING_FACE.items() if "model.embeddings.weight" in tensors else ():
            name = re.sub(old, new, name)
        if name.endswith(".att.x_x") and tensor.size % 6 == 0:  # the six mixes in one
            found |= {name[:-1] + n: row for n, row in zip("rwkvag", tensor.reshape(6, -1))}
        elif not re.fullmatch(r"blocks\.0\.att\.v[012]", name):  # which some files have, though there is no v before
            found[name] = tensor
    leftovers = [name for name in found if re.fullmatch(r"blocks\.[1-9]\d*\.ln0\.(weight|bias)", name)]
    if leftovers:
        E.note(f"{leftovers[0]} and the like are left out, as only the first layer has ln0")
    return {name: tensor for name, tensor in found.items() if name not in leftovers}


def official_config(tensors: dict[str, np.ndarray]) -> E.Config:
    """The shape of the RWKV-7 that these tensors are; raises ValueError if they are none."""
    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors or tensors[name].ndim != 2:
            raise ValueError(f"it has no matrix {name}, unlike an RWKV-7")
        return tensors[name].shape

    layers = max(1, sum(name.endswith(".ln1.weight") for name in tensors))
    last = f"blocks.{layers - 1}."
    (V, D), (_, N), (F, _) = shape("emb.weight"), shape(last + "att.r_k"), shape(last + "ffn.key.weight")
    inner = []
    for n in "wavg":  # of layers that differ, the widest, see `entries`; layer 0 has no v1
        names = [(f"blocks.{i}.att.{n}1", f"blocks.{i}.att.{n}2") for i in range(n == "v", layers)]
        for a, b in names:
            if shape(a)[1] != shape(b)[0]:
                raise ValueError(f"{b} is {list(shape(b))}, but {a} {list(shape(a))}")
        inner.append(max((shape(a)[1] for a, _ in names), default=1))
    try:
        cfg = E.Config(D, layers, N, V, F, tuple(inner))
    except E.UserError as e:
        raise ValueError(str(e)) from None  # so that the file is named
    for names, what in (set(cfg.params) - set(tensors), "lacks"), (set(tensors) - set(cfg.params), "has"):
        if names:
            raise ValueError(f"it {what} {min(names)}, unlike an RWKV-7")
    return cfg


TRANSPOSED = re.compile(r"\.att\.[wavg][12]$")  # official files hold these so


def entries(p: E.Param, tensor: np.ndarray) -> np.ndarray:
    """The entries of a parameter, float32 [out, cols], of a vector [out, 1]; raises ValueError."""
    w = tensor.T if TRANSPOSED.search(p.name) else tensor
    if w is not tensor and w.ndim == 2:  # a narrower small MLP than of other layers gets channels of zeros
        more = [0, p.cols - w.shape[1]] if p.name.endswith("2") else [p.out - w.shape[0], 0]
        w = np.pad(w, [(0, n) for n in more])
    if w.shape != (p.out, p.cols) if p.cols else w.size != p.out:  # a vector may be [1, 1, D], and r_k is [H, N]
        raise ValueError(f"{p.name} is {list(tensor.shape)}, which does not fit the other tensors")
    w = (w.astype(np.uint32) << 16).view(np.float32) if w.dtype == np.uint16 else w.astype(np.float32)
    if not (np.abs(w) < 1e6).all():  # so neither is NaN
        raise ValueError(f"{p.name} has entries that are too large or not finite")
    return w.reshape(p.out, -1)


# Matrices whose input can be scaled channel by channel; what makes that input, whose rows (of a vector, entries) can
# be scaled to make up for it; and the power of them that the input grows with.
SCALABLE = [(("att.receptance.weight", "att.key.weight", "att.value.weight", "att.w1", "att.a1", "att.v1", "att.g1"),
             ("ln1.weight", "ln1.bias"), 1), (("ffn.key.weight",), ("ln2.weight", "ln2.bias"), 1),
            (("ffn.value.weight",), ("ffn.key.weight",), 2), (("att.output.weight",), ("att.g2",), 1),
            (("att.a2",), ("att.a1",), 1), (("att.v2",), ("att.v1",), 1),
            (("head.weight",), ("ln_out.weight", "ln_out.bias"), 1)]
OUTLIER = 3  # times the median column's absmax is what a column may have; of 127 steps that leaves the others 42
MOST = 16  # times is moved at most: activations are int8, too, and an outlying channel takes steps from the others


def balance(cfg: E.Config, tensors: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What the columns [cols] of parameters are divided by, and what their rows [out, 1] are multiplied by.

    An outlying column would leave few int8 steps for the others of its matrix, so its size goes where the input comes
    from (as in SmoothQuant, arXiv 2211.10438): the function stays the same.
    """
    def excess(name: str) -> np.ndarray:
        top = np.abs(entries(cfg.params[name], tensors[name])).max(0)
        return np.clip(top / (OUTLIER * np.median(top) or np.inf), 1, MOST)

    shrink, grow = dict[str, np.ndarray](), dict[str, np.ndarray]()
    for readers, sources, power in SCALABLE:
        for block in [""] if readers[0] in cfg.params else [f"blocks.{i}." for i in range(cfg.layers)]:
            if names := [block + n for n in readers if block + n in cfg.params]:
                factor = np.max([excess(n) for n in names], 0)
                shrink |= dict.fromkeys(names, factor)
                grow |= {block + n: factor[:, None] ** np.float32(1 / power) for n in sources}
    return shrink, grow


def quantise(cfg: E.Config, tensors: dict[str, np.ndarray]) -> E.Model:
    """The int8 model. A row of a matrix has 127 steps to its absmax.

    A vector has a scale for each entry, since real files have some that are 100 times the ordinary: 96 steps to the
    entry or to the median, whichever is more. So small ones keep ordinary steps, and none starts at its limit of 127.
    """
    model, (shrink, grow) = E.empty_model(cfg), balance(cfg, tensors)
    for name, p in cfg.params.items():
        w = entries(p, tensors[name]) / shrink.get(name, np.float32(1)) * grow.get(name, np.float32(1))
        size = np.abs(w).max(1)
        usual = np.median(size) or size.mean() or np.float32(1)
        size = np.where(size > 0, size, usual) if p.cols else np.maximum(size, usual)
        scale = np.maximum(size, np.float32(1e-30)) / np.float32(127 if p.cols else 96)
        model.scales(name)[:] = scale
        model.weight(name)[:] = np.rint(w / scale[:, None]).reshape(model.weight(name).shape)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# The command


JOIN = "load the model in Python, and save it as one file"
FOREIGN = {  # what files begin with that are something else, what they are, and what to do
    b"version https://git-lfs": "a Git LFS pointer and not the file itself: get that with git lfs pull",
    b"<": "a web page: download the file that it is about",
    b"\x1f\x8b": "packed by gzip: unpack it with gunzip",
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19":
        "a .pth of torch before 1.6: write it anew with torch.save(torch.load(...), ...)",
    b"{": f"JSON, such as the index of several shards: {JOIN}"}


def other_kind(path: Path) -> str:
    """What a file is that cannot be read as what it should be, and what to do; "" if that is not known."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        head = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
        for start, what in FOREIGN.items():
            if head.startswith(start):
                return what
        if re.search(r"\d+-of-0*([2-9]|[1-9]\d+)\b", path.name):
            return f"one of several shards: {JOIN}"
    return ""


@contextlib.contextmanager
def reading(path: Path, what: str, remedy: str) -> Iterator[None]:
    """Make one E.UserError of whatever goes wrong with a file; a damaged one can raise almost anything."""
    try:
        yield
    except E.UserError:
        raise
    except Exception as e:
        if kind := other_kind(path):
            raise E.UserError(f"{path} is {kind}") from None
        why = f"{str(e) or type(e).__name__:.200}"
        cause = f"cannot read {path} ({e.strerror})" if isinstance(e, OSError) else f"{path} is no {what} ({why})"
        raise E.UserError(f"{cause}: {remedy}") from None


def read_vocab(path: Path, size: int) -> list[str]:
    """Tokens of a vocabulary of this size, as strings whose latin-1 bytes they are; "" for numbers that have none.

    The file has lines of the form: number 'Python literal' length-in-bytes. Raises ValueError.
    """
    tokens = [""] * size
    for line in path.read_text("utf-8").splitlines():
        number, rest = line.split(" ", 1)
        literal, length = rest.rsplit(" ", 1)
        token = ast.literal_eval(literal)
        token = token.encode() if isinstance(token, str) else token
        if not isinstance(token, bytes) or len(token) != int(length) or not token:
            raise ValueError(f"a line is {line[:40]}")
        if not 0 <= int(number) < size or tokens[int(number)]:
            raise ValueError(f"number {number} comes twice, or is beyond the {size} tokens of the model")
        tokens[int(number)] = token.decode("latin-1")
    if missing := {chr(byte) for byte in range(256)} - set(tokens):
        raise ValueError(f"no token is the byte {ord(min(missing))}")
    return tokens


def convert(path: Path, vocab: Path | None = None) -> E.Model:
    """The int8 model of an official checkpoint, with its tokens in model.extra["tokens"].

    Raises E.UserError unless every tensor of an RWKV-7 is there, whole, finite and in shape, and no other.
    """
    tokens = [chr(byte) for byte in range(256)]
    with reading(path, "whole RWKV-7 checkpoint", OTHER_FILE), np.errstate(over="ignore"), open(path, "rb") as file:
        tensors = official((read_safetensors if path.suffix.lower() == ".safetensors" else read_pth)(file))
        cfg = official_config(tensors)
        if vocab:
            with reading(vocab, "vocabulary of this model", VOCAB_FILE):
                tokens = read_vocab(vocab, cfg.vocab)
        elif cfg.vocab != len(tokens):
            raise E.UserError(f"{path} has {cfg.vocab} tokens and no names for them: {VOCAB_FILE}")
        model = quantise(cfg, tensors)
    model.extra["tokens"] = tokens
    return model


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 2 for what the user can mend."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: p.exit(2, f"convert: {message}; --help lists the options\n")
    p.add_argument("file", type=Path, help="the checkpoint, .pth or .safetensors")
    p.add_argument("--vocab", type=Path, help="its tokens: rwkv_vocab_v20230424.txt")
    p.add_argument("--out", type=Path, required=True, help="the model.npz to write")
    a = p.parse_args(argv)
    try:
        if a.out.exists():
            raise E.UserError(f"{a.out} exists and would be lost: give another --out")
        model = convert(a.file, a.vocab)
        E.save_model(model, a.out)
    except (E.UserError, OSError) as e:
        cause = f"cannot write {a.out} ({e.strerror}): give another --out" if isinstance(e, OSError) else str(e)
        cause = "".join(c if c.isprintable() else " " for c in cause)  # it may quote the file
        print(f"convert: {cause}", file=sys.stderr)
        return 2
    print(f"{a.out}: {sum(p.size for p in model.cfg.params.values()):,} int8 weights, {model.cfg}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
