"""Deliberate mistakes that model_qwen3.py alone can have: name -> (a piece of the source, what
replaces it). Each must turn a test of the model files red."""
QWEN3 = {
    # DeepStack
    "plane a layer early": (
        "            x, queries, cache[layer] = self.model.layers[layer](x, rope, cache[layer])\n"
        "            if layer < len(stream.planes):\n"
        "                x = add_to_visual(x, stream.planes[layer], stream.visual, "
        "stream.origin)\n",
        "            if layer < len(stream.planes):\n"
        "                x = add_to_visual(x, stream.planes[layer], stream.visual, stream.origin)\n"
        "            x, queries, cache[layer] = self.model.layers[layer](x, rope, cache[layer])\n"),
    "plane a layer late": (
        "            if layer < len(stream.planes):\n"
        "                x = add_to_visual(x, stream.planes[layer],",
        "            if 0 < layer <= len(stream.planes):\n"
        "                x = add_to_visual(x, stream.planes[layer - 1],"),
    "no planes": ("if layer < len(stream.planes):", "if False:"),
    "last plane left out": ("layer < len(stream.planes)", "layer < len(stream.planes) - 1"),
    "planes in the opposite order": ("stream.planes[layer]", "stream.planes[-1 - layer]"),
    "planes not thinned": ("+= plane[origin] ", "+= plane[:V] "),
    "planes of the first variant for all": ("+= plane[origin] ", "+= plane[origin[:1]] "),
    "plane on the rows before its own": ("x[:, start:start + V] +=",
                                         "x[:, start - 1:start + V - 1] +="),
    "planes on new tokens": ("queries=None, planes=())", "queries=None)"),
    "plane branches off before its block": (
        "            x, q, k = block(x, rope)\n"
        "            if i in self.c.deepstack_visual_indexes:\n"
        "                merger = self.deepstack_merger_list[len(planes)]\n"
        "                planes.append(merger(x))\n",
        "            if i in self.c.deepstack_visual_indexes:\n"
        "                merger = self.deepstack_merger_list[len(planes)]\n"
        "                planes.append(merger(x))\n"
        "            x, q, k = block(x, rope)\n"),
    "planes by the first merger alone": ("deepstack_merger_list[len(planes)]",
                                         "deepstack_merger_list[0]"),
    "planes by the mergers in the opposite order": ("deepstack_merger_list[len(planes)]",
                                                    "deepstack_merger_list[-1 - len(planes)]"),

    # tower
    "position grid without align_corners": ("align_corners=True", "align_corners=False"),
    "nearest learned position": ('mode="bilinear", align_corners=True', 'mode="nearest"'),
    "no learned positions": ("self.learned_positions(grid).to(x.dtype)",
                             "0 * self.learned_positions(grid).to(x.dtype)"),
    "learned positions in raster order": ("return by_token(table[0].permute(1, 2, 0), m)",
                                          "return table[0].permute(1, 2, 0).flatten(0, 1)"),
    "learned positions transposed": ("view(side, side, -1).permute(2, 0, 1)",
                                     "view(side, side, -1).permute(2, 1, 0)"),
    "no bias of the patch embedding": ("proj.weight.flatten(1), proj.bias)",
                                       "proj.weight.flatten(1))"),
    "tower epsilon": ("norm1 = nn.LayerNorm(c.hidden_size, 1e-6)",
                      "norm1 = nn.LayerNorm(c.hidden_size, 1e-5)"),
    "merger epsilon": ("else c.hidden_size, 1e-6)", "else c.hidden_size, 1e-5)"),
    "tower with the exact GELU": (', approximate="tanh")', ")"),
    "mergers with the tanh GELU": ("F.gelu(self.linear_fc1(x)))",
                                   'F.gelu(self.linear_fc1(x), approximate="tanh"))'),
    "raster patches": (
        "    return x.unflatten(1, (-1, m)).unflatten(0, (-1, m)).transpose(1, 2).flatten(0, 3)",
        "    return x.flatten(0, 1)"),
    "row and column swapped in the tower": ("for place in (y, x)", "for place in (x, y)"),
    "tower rope theta": ("inv_freq = 1e4 **", "inv_freq = 1e6 **"),
    "saliency sent, not received": (".softmax(-1).sum((1, 2))", ".softmax(-2).sum((1, 3))"),
    "saliency in raster order of patches": (".unflatten(1, (-1, patches_per_token)).mean(2)",
                                            ".unflatten(1, (patches_per_token, -1)).mean(1)"),

    # decoder
    "no q norm": ("q = self.q_norm(self.q_proj(x).view(B, T, self.H, self.D))",
                  "q = self.q_proj(x).view(B, T, self.H, self.D)"),
    "no k norm": ("k = self.k_norm(self.k_proj(x).view(B, T, self.G, self.D))",
                  "k = self.k_proj(x).view(B, T, self.G, self.D)"),
    "queries normed as keys": ("q = self.q_norm(", "q = self.k_norm("),
    "q norm after the rotation": (
        "        q = rotate(q.transpose(1, 2), rope) ",
        "        q = self.q_proj(x).view(B, T, self.H, self.D)\n"
        "        q = self.q_norm(rotate(q.transpose(1, 2), rope)) "),
    "epsilon of the head norms": ("self.q_norm = RMSNorm(self.D, c.rms_norm_eps)",
                                  "self.q_norm = RMSNorm(self.D, 1e-5)"),
    "head_dim from the hidden size": ("self.D = c.head_dim",
                                      "self.D = c.hidden_size // c.num_attention_heads"),
    "softmax scale from the hidden size": (
        "is_causal=past is None,",
        "scale=(x.shape[-1] // self.H) ** -0.5, is_causal=past is None,"),
    "M-RoPE contiguous instead of interleaved": (
        "        by_row = slice(1, 3 * rows, 3)\n"
        "        by_col = slice(2, 3 * cols, 3)\n",
        "        by_row = slice(-rows - cols, -cols)\n"
        "        by_col = slice(-cols, None)\n"),
    "rows and columns swapped in M-RoPE": ("t, y, x = pos[", "t, x, y = pos["),
    "M-RoPE's rows begin at frequency 0": ("slice(1, 3 * rows, 3)", "slice(0, 3 * rows, 3)"),
    "M-RoPE's rows to the last frequency": ("slice(1, 3 * rows, 3)", "slice(1, None, 3)"),
    "M-RoPE's columns as many as the rows": ("slice(2, 3 * cols, 3)", "slice(2, 3 * rows, 3)"),
    "rope theta of rope_parameters ignored": (
        '("rope_theta", "mrope_section", "mrope_interleaved")',
        '("mrope_section", "mrope_interleaved")'),
    "text goes on after rows * columns": ("    pos[:, end:] += shift\n", ""),
    "decoding position is the number of rows": ("return pos, T + shift", "return pos, T"),

    # prompt, image, folder
    "system turn kept": ('PROMPT = ("<|im_start|>user',
                         'PROMPT = ("<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n'
                         '<|im_start|>user'),
    "factor 28": ("return self.vision.patch_size * self.vision.spatial_merge_size", "return 28"),
    "mean of CLIP": ("np.float32(MEAN)",
                     "np.array((0.48145466, 0.4578275, 0.40821073), np.float32)"),
    "std of CLIP": ("np.float32(STD)",
                    "np.array((0.26862954, 0.26130258, 0.27577711), np.float32)"),
    "alpha dropped": ("on_white(image).resize", 'image.convert("RGB").resize'),
    "halves rounded up": ("h = round(height / factor) * factor",
                          "h = math.floor(height / factor + 0.5) * factor"),
    "bounds of Qwen2.5-VL": ("PIXEL_BOUNDS = (256 * 256, 4096 * 4096)",
                             "PIXEL_BOUNDS = (56 * 56, 16384 * 28 * 28)"),
    "bounds of the caller ignored": ("config.min_pixels = min_pixels", "pass"),
    "mixture of experts not refused": ("if kind in REFUSED:", "if False:"),
}
