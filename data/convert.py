# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=2.0", "safetensors", "torch"]
# ///
"""Convert an official RWKV-7 checkpoint to the int8 model.npz of nano_eggroll.py.

    python data/convert.py rwkv7.pth --vocab rwkv_vocab_v20230424.txt --out world.npz
    python nano_eggroll.py --load world.npz --sample "User: why is the sky blue?"

Reads .pth (pip install torch) and .safetensors (pip install safetensors), with official or with Hugging Face names.
The World models need their vocabulary; a model of 256 tokens reads bytes. Code in a .pth is never run.
"""

import argparse
import ast
import contextlib
import pickle
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import nano_eggroll as E

Tensors = dict[str, np.ndarray]

# ---------------------------------------------------------------------------------------------------------------------
# The tensors of a file

OTHER_FILE = "use a whole one with official names, .safetensors or .pth, such as those of huggingface.co/BlinkDL"
VOCAB_FILE = "give --vocab rwkv_vocab_v20230424.txt, which is in the PyPI package rwkv (pip download --no-deps rwkv)"
JOIN = "load the model in Python and save it as one file"
FOREIGN = {  # how other kinds of files begin, what they are, and what to do
    b"version https://git-lfs": "a Git LFS pointer instead of the file: get the file with git lfs pull",
    b"<": "a web page: download the file itself",
    b"\x1f\x8b": "packed by gzip: unpack it with gunzip",
    b"{": f"JSON, such as the index of several shards: {JOIN}",
    **dict.fromkeys([b"GGUF", b"lmgg", b"fmgg", b"tjgg"], f"for llama.cpp or rwkv.cpp: {OTHER_FILE}")}

# numpy has no bfloat16, which is the upper half of a float32; int16 stands for it here
DTYPES = {"BF16": "<i2", "F16": "<f2", "F32": "<f4", "F64": "<f8"}


@contextlib.contextmanager
def reading(path: Path, what: str, remedy: str) -> Iterator[None]:
    """Turn whatever goes wrong with a file into one E.UserError; a damaged file can raise almost anything."""
    try:
        yield
    except Exception as e:
        head, why = b"", (e.strerror if isinstance(e, OSError) else str(e)) or type(e).__name__
        with contextlib.suppress(OSError), open(path, "rb") as file:
            head = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
        kinds = [kind for start, kind in FOREIGN.items() if head.startswith(start)]
        if re.search(r"\d+-of-0*([2-9]|[1-9]\d+)\b", path.name):
            kinds.append(f"one of several shards: {JOIN}")
        if isinstance(e, ImportError):
            remedy = f"pip install {e.name}"
        kinds.append(f"not a {what} that can be read ({why:.200}): {remedy}")
        raise E.UserError(f"{path} is {kinds[0]}") from None


def read_pth(path: Path) -> Tensors:
    """Tensors by name of what torch.save wrote. Raises ValueError for a pickle that asks for anything else."""
    import torch

    zipped = zipfile.is_zipfile(path)  # since torch 1.6
    if zipped and zipfile.ZipFile(path).testzip():  # torch itself does not compare checksums
        raise ValueError("it is damaged")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as e:  # whose text recommends weights_only=False
        asked = re.search(r"GLOBAL (\S+)", str(e))
        raise ValueError(f"it asks for {asked[1]}" if asked else "it is not a file of torch.save") from None
    found = found.get("state_dict", found) if isinstance(found, dict) else {"": found}
    if not all(isinstance(t, torch.Tensor) and t.is_floating_point() for t in found.values()):
        raise ValueError("it holds other things than tensors of floats by name")
    return {name: (t.view(torch.int16) if t.dtype == torch.bfloat16 else t.detach()).numpy()
            for name, t in found.items()}


def read_safetensors(path: Path) -> Tensors:
    """Tensors by name."""
    from safetensors import deserialize

    return {name: np.frombuffer(t["data"], DTYPES[t["dtype"]]).reshape(t["shape"])
            for name, t in deserialize(path.read_bytes())}


# ---------------------------------------------------------------------------------------------------------------------
# Their names and shapes

# What the Hugging Face form (flash-linear-attention) calls the parameters: a part of a name, and the official one
HUGGING_FACE = {r"^model\.embeddings": "emb", r"^model\.norm": "ln_out", r"^lm_head": "head",
                r"^model\.layers\.": "blocks.", r"\.pre_norm": ".ln0", r"\.attn_norm": ".ln1", r"\.ffn_norm": ".ln2",
                r"\.attn\.g_norm": ".att.ln_x", r"\.attn\.": ".att.", r"r_proj": "receptance", r"k_proj": "key",
                r"v_proj": "value", r"o_proj": "output", r"([wavg])_lora\.lora\.2\.bias": r"\g<1>0",
                r"([wavg])_lora\.lora\.0\.weight": r"\g<1>1", r"([wavg])_lora\.lora\.2\.weight": r"\g<1>2"}
WRAPPED = r"^((_orig_mod|_forward_module|module)\.)+"  # what torch.compile and DataParallel put before names
UNUSED = r"blocks\.(0\.att\.v[012]|[1-9]\d*\.ln0\.\w+)"  # in some files; only layer 0 has ln0, and it has no earlier v
TRANSPOSED = re.compile(r"\.att\.[wavg][12]$")  # in official files these are [in, out]


def official(tensors: Tensors) -> Tensors:
    """The same tensors with official names and order of axes, without those that no RWKV-7 uses."""
    tensors, found = {re.sub(WRAPPED, "", name): tensor for name, tensor in tensors.items()}, {}
    for name, tensor in tensors.items():
        tensor = tensor.T if re.search(r"_lora\.lora\.[02]\.weight$", name) else tensor
        for old, new in HUGGING_FACE.items() if "model.embeddings.weight" in tensors else ():
            name = re.sub(old, new, name)
        if name.endswith(".att.x_x") and tensor.size % 6 == 0:  # the six mixes in one
            found |= {name[:-1] + n: row for n, row in zip("rwkvag", tensor.reshape(6, -1))}
        elif not re.fullmatch(UNUSED, name):
            found[name] = tensor
    return found


def official_config(tensors: Tensors) -> E.Config:
    """The shape of the RWKV-7 that these tensors are; raises ValueError if they are none."""
    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors or tensors[name].ndim != 2:
            raise ValueError(f"it has no matrix {name}, unlike an RWKV-7")
        return tensors[name].shape

    layers = 1 + max((int(n) for n in re.findall(r"^blocks\.(\d+)\.", "\n".join(tensors), re.M)), default=0)
    last, inner = f"blocks.{layers - 1}.", []
    (V, D), (_, N), (F, _) = shape("emb.weight"), shape(last + "att.r_k"), shape(last + "ffn.key.weight")
    for n in "wavg":
        names = [f"blocks.{i}.att.{n}" for i in range(n == "v", layers)]  # layer 0 has no v
        if odd := [name for name in names if shape(name + "1")[1] != shape(name + "2")[0]]:
            raise ValueError(f"{odd[0]}1 and {odd[0]}2 do not fit each other")
        inner.append(max((shape(name + "1")[1] for name in names), default=1))  # the others are padded, see `entries`
    cfg = E.Config(D, layers, N, V, F, tuple(inner))
    for names, what in (set(cfg.params) - set(tensors), "lacks"), (set(tensors) - set(cfg.params), "has"):
        if names:
            raise ValueError(f"it {what} {min(names)}, unlike an RWKV-7")
    return cfg


def checkpoint(path: Path) -> tuple[E.Config, Tensors]:
    """The shape of a checkpoint, and its tensors, which are all that an RWKV-7 has; raises E.UserError."""
    with reading(path, "whole RWKV-7 checkpoint", OTHER_FILE):
        tensors = official((read_safetensors if path.suffix == ".safetensors" else read_pth)(path))
        return official_config(tensors), tensors


def entries(p: E.Param, tensor: np.ndarray) -> np.ndarray:
    """The entries of a parameter, float32 [out, cols], of a vector [out, 1]; raises ValueError."""
    w = tensor.T if TRANSPOSED.search(p.name) else tensor
    if w is not tensor and w.ndim == 2:  # a small MLP that is narrower than in other layers gets channels of zeros
        more = [0, p.cols - w.shape[1]] if p.name.endswith("2") else [p.out - w.shape[0], 0]
        w = np.pad(w, [(0, n) for n in more])
    if w.shape != (p.out, p.cols) if p.cols else w.size != p.out:  # a vector may be [1, 1, D], and r_k is [H, N]
        raise ValueError(f"{p.name} is {list(tensor.shape)}, which does not fit the other tensors")
    w = (w.astype(np.uint32) << 16).view(np.float32) if w.dtype == np.int16 else w.astype(np.float32)
    if not (np.abs(w) < 1e6).all():  # so neither is NaN
        raise ValueError(f"{p.name} has entries that are too large or not finite")
    return w.reshape(p.out, -1)


# ---------------------------------------------------------------------------------------------------------------------
# In int8

# Matrices whose input can be scaled channel by channel; what makes that input, whose rows (of a vector, entries) can
# be scaled to make up for it; and the power of them that the input grows with.
SCALABLE = [(("att.receptance.weight", "att.key.weight", "att.value.weight", "att.w1", "att.a1", "att.v1", "att.g1"),
             ("ln1.weight", "ln1.bias"), 1), (("ffn.key.weight",), ("ln2.weight", "ln2.bias"), 1),
            (("ffn.value.weight",), ("ffn.key.weight",), 2), (("att.output.weight",), ("att.g2",), 1),
            (("att.a2",), ("att.a1",), 1), (("att.v2",), ("att.v1",), 1),
            (("head.weight",), ("ln_out.weight", "ln_out.bias"), 1)]
OUTLIER = 3  # times the median column's absmax is what a column may have; of 127 levels that leaves the others 42
MOST = 16  # times is moved at most: activations are int8, too, and an outlying channel takes levels from the others


def balance(cfg: E.Config, tensors: Tensors) -> tuple[Tensors, Tensors]:
    """What the columns [cols] of parameters are divided by, and what their rows [out, 1] are multiplied by.

    An outlying column would leave few int8 levels for the others of its matrix, so its size goes where the input comes
    from (as in SmoothQuant, arXiv 2211.10438): the function stays the same.
    """
    def excess(name: str) -> np.ndarray:
        top = np.abs(entries(cfg.params[name], tensors[name])).max(0)
        return np.clip(top / (OUTLIER * np.median(top) or np.inf), 1, MOST)

    shrink, grow = {}, {}
    for readers, sources, power in SCALABLE:
        for block in [""] if readers[0] in cfg.params else [f"blocks.{i}." for i in range(cfg.layers)]:
            if names := [block + n for n in readers if block + n in cfg.params]:
                factor = np.max([excess(n) for n in names], 0)
                shrink |= dict.fromkeys(names, factor)
                grow |= {block + n: factor[:, None] ** np.float32(1 / power) for n in sources}
    return shrink, grow


def quantise(cfg: E.Config, tensors: Tensors) -> E.Model:
    """The int8 model. A row of a matrix has 127 levels up to its absmax.

    A vector has a scale for each entry, since real files have some that are 100 times the ordinary: 96 levels to the
    entry or to the median, whichever is more. So small ones keep ordinary levels, and none starts at its limit of 127.
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


def read_vocab(path: Path, size: int) -> list[str]:
    """Tokens of a vocabulary of this size, as strings whose latin-1 bytes they are; "" for numbers that have none.

    The file has lines of the form: number 'Python literal' length-in-bytes. Raises ValueError.
    """
    tokens = [""] * size
    for line in path.read_text("utf-8").splitlines():
        number, rest = line.split(" ", 1)
        literal, length = rest.rsplit(" ", 1)
        token = ast.literal_eval(literal)
        token = token if isinstance(token, bytes) else token.encode()
        if not len(token) == int(length) > 0 or not 0 <= int(number) < size or tokens[int(number)]:
            raise ValueError(f"of {size} tokens, one cannot be {line[:40]}")
        tokens[int(number)] = token.decode("latin-1")
    if missing := {chr(byte) for byte in range(256)} - set(tokens):
        raise ValueError(f"no token is the byte {ord(min(missing))}")
    return tokens


def convert(path: Path, vocab: Path | None = None) -> E.Model:
    """The int8 model of a checkpoint, with its tokens in model.extra["tokens"]; raises E.UserError."""
    cfg, tensors = checkpoint(path)
    tokens = [chr(byte) for byte in range(256)]
    if vocab:
        with reading(vocab, "vocabulary of this model", VOCAB_FILE):
            tokens = read_vocab(vocab, cfg.vocab)
    elif cfg.vocab != len(tokens):
        raise E.UserError(f"{path} has {cfg.vocab} tokens and no names for them: {VOCAB_FILE}")
    with reading(path, "whole RWKV-7 checkpoint", OTHER_FILE):
        model = quantise(cfg, tensors)
    model.extra["tokens"] = tokens
    return model


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 2 for what the user can mend."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
        print("convert:", "".join(c if c.isprintable() else " " for c in cause), file=sys.stderr)  # it may quote a file
        return 2
    print(f"{a.out}: {sum(p.size for p in model.cfg.params.values()):,} int8 weights, {model.cfg}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
