"""What is drawn and asked about, in words, and the tokenizers of the two models.

Both are the published tokenizers in small: the same normalizer, special tokens and decoder. A word
of a question is one token; every other text is one token a character (LLaVA) or a byte (Qwen).
"""
from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers,
                        processors)

import model_llava
from support.benchmarks import SHORT

SHAPES = ["circle", "square", "triangle", "cross", "star", "ring"]
COLORS = ["red", "green", "blue", "orange", "purple", "black"]
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six"]

TEMPLATES = """USER ASSISTANT Yes No What does the word say Is there a in this image Are there
    shapes How many are color is on left right side of above below ten an none"""
VOCABULARY = {*TEMPLATES.split(), *SHAPES, *COLORS, *NUMBERS}
# Words that only later stages ask with. In LLaVA's tokenizer their ids come last, so that adding
# them did not change the ids of the stages before.
MORE_WORDS = {"Where", "shape", "at", "top", "bottom"}
LAST_WORDS = ["characters", "first", "character", "digit"]


def llava_tokenizer() -> Tokenizer:
    """LLaMA's tokenizer in small; "▁" is a space.

    The two sentences that stand in every prompt are one token each, so that the small decoder
    spends its time elsewhere.
    """
    characters = [chr(i) for i in range(33, 127)] + ["\n", "▁"]
    after_space = [c for c in characters if c != "▁"]
    sentences = [model_llava.PROMPT.split(" USER")[0], SHORT.strip()]
    tokens = ["<unk>", "<s>", "</s>", *characters, *("▁" + c for c in after_space)]
    for words in (VOCABULARY, {"▁" + word for word in VOCABULARY}):
        tokens += sorted(words)
    tokens += ["<image>", "<pad>", *sentences]
    for words in (MORE_WORDS, {"▁" + word for word in MORE_WORDS}):
        tokens += sorted(words)
    tokens += ["▁" + word for word in LAST_WORDS]
    tokenizer = Tokenizer(models.BPE(vocab=number(tokens), merges=[("▁", c) for c in after_space],
                                     unk_token="<unk>", ignore_merges=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?\w+|▁?[^\w▁]|▁"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in sentences])
    return tokenizer


def qwen_tokenizer() -> Tokenizer:
    """Qwen's tokenizer in small: NFC, bytes, and ChatML's special tokens last; "Ġ" is a space.

    The parts of the template that stand in every prompt are one token each, as in LLaVA's.
    """
    words = sorted({*VOCABULARY, *MORE_WORDS, *LAST_WORDS})
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += words
    tokens += ["Ġ" + word for word in words]
    tokenizer = Tokenizer(models.BPE(vocab=number(tokens), merges=[], ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r" ?\w+| ?[^\w\s]|\s"), "isolated"),
        pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["endoftext", "im_start", "im_end", "vision_start", "vision_end", "vision_pad",
               "image_pad", "video_pad"]
    tokenizer.add_special_tokens([f"<|{name}|>" for name in special])
    sentences = ["system\nYou are a helpful assistant.", "user\n", "assistant\n", SHORT.strip()]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in sentences])
    return tokenizer


def number(tokens: list[str]) -> dict[str, int]:
    """An id for each token, in order; "a" is both a character and a word, and is counted once."""
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}
