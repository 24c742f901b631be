"""Deliberate mistakes in the model files, one at a time: each must turn a test of them red.

    python tests/mutants.py        a few minutes; exits with 1 if a mistake goes unnoticed
"""
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
LLAVA = {
    "feature layer one too deep": ("num_hidden_layers + 1 + layer", "num_hidden_layers + 2 + layer"),
    "feature layer one too shallow": ("num_hidden_layers + 1 + layer", "num_hidden_layers + layer"),
    "no pre_layrnorm": ("self.pre_layrnorm(self.embeddings(pixels))", "self.embeddings(pixels)"),
    "CLS kept, last patch dropped": ("return x[:, 1:], saliency", "return x[:, :-1], saliency"),
    "CLIP with the exact GELU": ("x.mul_(torch.sigmoid_(1.702 * x))", "F.gelu(x)"),
    "projector with the tanh GELU": ("F.gelu(self.linear_1(x))", 'F.gelu(self.linear_1(x), approximate="tanh")'),
    "CLIP epsilon": ("c.hidden_size, c.layer_norm_eps)", "c.hidden_size, 1e-6)"),
    "CLIP epsilon when the config leaves it out": ("layer_norm_eps: float = 1e-5", "layer_norm_eps: float = 1e-6"),
    "LLaMA epsilon": ("c.hidden_size, c.rms_norm_eps)", "c.hidden_size, 1e-6)"),
    "patches in column order": (".flatten(2).transpose(1, 2)  ", ".transpose(2, 3).flatten(2).transpose(1, 2)  "),
    "grouped heads tiled, not repeated": (
        "        y = F.scaled_dot_product_attention(q, k, v,",
        "        k, v = (t.repeat(1, self.H // self.G, 1, 1) for t in (k, v))\n"
        "        y = F.scaled_dot_product_attention(q, k, v,"),
    "interleaved rope": ("x.roll(x.shape[-1] // 2, -1)", "x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)"),
    "rope theta of the config ignored": ("    config.text.rope_theta = known(", "    ignored = known("),
    "rope theta when the config leaves it out": ("rope_theta: float = 1e4", "rope_theta: float = 1e6"),
    "no softmax scale": ("attn_mask=mask,", "attn_mask=mask, scale=1.0,"),
    "no final norm": ("self.lm_head(self.final_norm(stream.x[:, -1]))", "self.lm_head(stream.x[:, -1])"),
    "norm weight before rounding, plus one": ("return self.weight * F", "return (1 + self.weight) * F"),
    "not causal": ("is_causal=past is None and mask is None", "is_causal=False"),
    "gate and up swapped": ("F.silu(self.gate_proj(x), inplace=True).mul_(self.up_proj(x))", "F.silu(self.up_proj(x)) * self.gate_proj(x)"),
    "decoding position is the length of the last cache": ("torch.arange(stream.next_pos, after", "torch.arange(n := (*stream.cache[-1], stream.cache[-1][0].shape[2])[2], n + 1"),
    "image between the wrong rows": ("x[start:start + V] = features", "x[:V] = features"),
    "pixels scaled in float32": ("astype(np.float64) * (1 / 255)).astype(np.float32)", "astype(np.float32) * np.float32(1 / 255))"),
    "bilinear resize": ("Image.BICUBIC", "Image.BILINEAR"),
    "padding rounded up": ("int(m * 255)", "round(m * 255)"),
    "crop rounded up": ("(image.width - size) // 2", "(image.width - size + 1) // 2"),
    "long edge rounded": ("long = int(size * long / short)", "long = round(size * long / short)"),
    "alpha dropped when cropping": ('pad_to_square(image) if mode == "pad" else on_white(image)',
                                    'pad_to_square(image) if mode == "pad" else image.convert("RGB")'),
}
QWEN = {
    "grouped heads tiled, not repeated": LLAVA["grouped heads tiled, not repeated"],
    "interleaved rope": LLAVA["interleaved rope"],
    "no final norm": LLAVA["no final norm"],
    "not causal": LLAVA["not causal"],
    "pixels scaled in float32": LLAVA["pixels scaled in float32"],
    "bilinear resize": LLAVA["bilinear resize"],
    "alpha dropped": ("on_white(image).resize", 'image.convert("RGB").resize'),
    "rope theta of the config ignored": ('if k in ("rope_theta", "mrope_section")', 'if k == "mrope_section"'),
    "LLM epsilon": ("RMSNorm(c.hidden_size, c.rms_norm_eps)", "RMSNorm(c.hidden_size, 1e-5)"),
    "tower epsilon": ("norm1 = RMSNorm(c.hidden_size, 1e-6)", "norm1 = RMSNorm(c.hidden_size, 1e-5)"),
    "merger epsilon": ("ln_q = RMSNorm(c.hidden_size, 1e-6)", "ln_q = RMSNorm(c.hidden_size, 1e-5)"),
    "no biases on queries": ("self.q_proj = nn.Linear(c.hidden_size, self.H * self.D)", "self.q_proj = nn.Linear(c.hidden_size, self.H * self.D, bias=False)"),
    "no M-RoPE: every axis is t": ("part[axis] for axis, part", "part[0] for axis, part"),
    "h and w swapped in the decoder": ("part[axis] for axis, part", "part[[0, 2, 1][axis]] for axis, part"),
    "interleaved M-RoPE sections": ("angles = torch.cat([part[axis] for axis, part in enumerate(parts)], -1)[:, None]",
                                    "angles = torch.stack([angles[i % 3, ..., i] for i in range(angles.shape[-1])], -1)[:, None]"),
    "text goes on after rows * columns": ("pos[:, end:] += max(rows, cols) - rows * cols\n", ""),
    "text goes on after the rows": ("pos[:, end:] += max(rows, cols)", "pos[:, end:] += rows"),
    "decoding position is the number of rows": ("T + max(rows, cols) - rows * cols\n", "T\n"),
    "decoding position is the length of the last cache": ("torch.arange(stream.next_pos, after", "torch.arange(n := (*stream.cache[-1], stream.cache[-1][0].shape[2])[2], n + 1"),
    "image from position 0": ("pos[1, start:end] = start + ", "pos[1, start:end] = "),
    "raster patches": ("    return x.unflatten(1, (-1, m)).unflatten(0, (-1, m)).transpose(1, 2).flatten(0, 3)", "    return x.flatten(0, 1)"),
    "y and x swapped in the tower": ("for place in (y, x)", "for place in (x, y)"),
    "tower rope theta": ("inv_freq = 1e4 **", "inv_freq = 1e6 **"),
    "full attention everywhere": ("None if i in self.c.fullatt_block_indexes else window", "None"),
    "windows everywhere": ("None if i in self.c.fullatt_block_indexes else window", "window"),
    "windows and full attention swapped": ("None if i in self.c.fullatt_block_indexes", "None if i not in self.c.fullatt_block_indexes"),
    "window twice as wide": ("self.c.window_size // self.c.patch_size // m,", "self.c.window_size // self.c.patch_size,"),
    "padding of windows attended to": ("return index, back, None if mask.all() else mask[:, None]", "return index, back, None"),
    "patches not put back": ("there[index.flatten()[there].argsort()]", "there"),
    "merger with the tanh GELU": ("nn.GELU()", 'nn.GELU("tanh")'),
    "tower MLP with GELU": ("F.silu(self.gate_proj(x), inplace=True)", "F.gelu(self.gate_proj(x))"),
    "halves rounded up": ("round(height / factor) * factor, round(width / factor) * factor",
                          "math.floor(height / factor + 0.5) * factor, math.floor(width / factor + 0.5) * factor"),
    "shrunk image rounded up": ("math.floor(side / shrink / factor)", "math.ceil(side / shrink / factor)"),
    "grown image rounded down": ("math.ceil(side * grow / factor)", "math.floor(side * grow / factor)"),
    "saliency of the first full block": ("if i == max(", "if i == min("),
    "saliency sent, not received": (".softmax(-1).sum((1, 2))", ".softmax(-2).sum((1, 3))"),
    "no repetition penalty": ("said * repetition_penalty, said / repetition_penalty", "said, said"),
    "repetition penalty on the prompt alone": ("            seen = torch.cat([seen, ids[:, None]], 1)\n", ""),
    "a stored head ignored when tied": ("(embed in found) != (head in found)", "embed in found"),
}
LLAVA |= {name: QWEN[name] for name in ("no repetition penalty", "repetition penalty on the prompt alone")}
MUTANTS = {"model_llava.py": LLAVA, "model_qwen.py": QWEN}


def main():
    unnoticed = []
    for module, name, old, new in [(module, name, *change) for module, mistakes in MUTANTS.items() for name, change in mistakes.items()]:
        with tempfile.TemporaryDirectory() as folder:
            for part in ("model_llava.py", "model_qwen.py", "tokprune.py"):
                shutil.copy(ROOT / part, folder)
            shutil.copytree(ROOT / "tests", Path(folder) / "tests")
            source = (ROOT / module).read_text()
            assert old in source, f"{name}: {old!r} is not in {module} any more"
            (Path(folder) / module).write_text(source.replace(old, new))
            tests = [f"tests/{module.replace('model', 'test')}", "tests/test_models.py", "-k", "not deliberate"]
            run = subprocess.run([sys.executable, "-m", "pytest", "-qx", *tests], cwd=folder, capture_output=True, text=True)
        red = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        print(f"{module}, {name}: {red[0].split(' - ')[0] if red else 'UNNOTICED'}", flush=True)
        unnoticed += [] if red else [name]
    sys.exit(bool(unnoticed))


if __name__ == "__main__":
    main()
