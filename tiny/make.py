"""Make what is in tiny/ from seeds: two benchmarks, and a LLaVA-1.5 and a Qwen2.5-VL that are
trained to answer them.

    python tiny/make.py                 all of it; an interrupted run resumes where it stopped
    python tiny/make.py --data          only the benchmarks (seconds)
    python tiny/make.py --only qwen     the benchmarks and one model
    python tiny/make.py --seed 1        other weights and training images: tiny/llava-1, tiny/qwen-1

scenes.py draws images of one or two words and one to four shapes. questions.py asks about them, and
writes the benchmarks, whose words are in no training image. batches.py packs questions behind their
image. training.py has the losses and the loop: ordinary next-token prediction of the answers, with
every visual token in every layer; nothing in it knows about pruning. export.py writes the folders.

On two CPU cores, with other work beside it, LLaVA took 138 minutes and Qwen 87; a CUDA device is
used if there is one.
"""
import argparse
import sys
from pathlib import Path
from typing import Callable

import torch
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import model_llava  # noqa: E402
import model_qwen  # noqa: E402
from tiny import questions as ask  # noqa: E402
from tiny.batches import CHATML, PATCH, VICUNA, Batches, Chat, Stage  # noqa: E402
from tiny.export import export_llava, export_qwen  # noqa: E402
from tiny.scenes import OBLONG, SIDE, SQUARE  # noqa: E402
from tiny.training import (answer_loss, double, llava_tower, masked_layer,  # noqa: E402
                           qwen_tower, speed_up, train)

ALL_SIZES = SQUARE + OBLONG
HALF_SQUARE = 6 * SQUARE + OBLONG

# name, steps, the steps in which the rate falls to 2 %, its highest, images a step, their sizes,
# what is asked besides every word
LLAVA_STAGES = [
    # the tower alone, on what lies on each visual token
    Stage("tower", 3000, 3000, 1.5e-3, 32, SQUARE, None),
    # tower and 12 layers, on the simple questions
    Stage("answers", 1600, 1600, 1.5e-3, 32, SQUARE, ask.EASY, words_first=False),
    # and sides, and from a color to its shape
    Stage("more", 2000, 2000, 1.5e-3, 32, SQUARE, ask.SIDES, words_first=False),
    # more often what is learned last
    Stage("hard", 2400, 2400, 1.2e-3, 16, SQUARE, ask.HARD),
    # 24 layers; ends while the rate is still high
    Stage("deep", 900, 2500, 1e-3, 16, SQUARE, ask.LENGTHS),
    # the questions of the benchmarks
    Stage("last", 1450, 1450, 9e-4, 16, SQUARE, ask.AS_MME),
    # the same on oblong images, padded as LLaVA pads them
    Stage("shapes", 600, 600, 6e-4, 16, ALL_SIZES, ask.AS_MME),
    # half of them square
    Stage("mixed", 250, 250, 4e-4, 16, HALF_SQUARE, ask.AS_MME)]

QWEN_STAGES = [
    # tower and embedding, on what lies on each visual token
    Stage("qwen-tower", 1600, 1600, 1.5e-3, 32, ALL_SIZES, None),
    # tower and 14 layers, every simple question; ends at a high rate
    Stage("qwen-answers", 1400, 4000, 1.5e-3, 32, ALL_SIZES, ask.AS_MME_AND_OPEN),
    # both questions of each yes/no pair
    Stage("qwen-pairs", 700, 4000, 1.4e-3, 32, ALL_SIZES, ask.PAIRS),
    # 28 layers
    Stage("qwen-deep", 1200, 1200, 1e-3, 16, ALL_SIZES, ask.PAIRS_AND_OPEN),
    # more about color, which is learned last
    Stage("qwen-last", 400, 400, 8e-4, 16, ALL_SIZES, ask.MORE_COLOR)]


def train_model(make: Callable, layers: int, tower_and_loss: Callable, stages: list[Stage],
                chat: Chat, device: torch.device, seed: int) -> nn.Module:
    """Run the stages in order, each from its own checkpoint if there is one.

    make(layers, tokenizer) -> a model. tower_and_loss(model) -> what its first stage trains, and
    the loss.
    """
    torch.manual_seed(seed)
    model = make(layers, chat.tokenizer()).to(device)
    layer = torch.compile(masked_layer)
    speed_up(model)

    def loss(*batch):
        return answer_loss(model, layer, *batch)

    for stage in stages:
        batches = Batches(stage, chat, seed)
        if stage.asked is None:
            tower, tower_loss = tower_and_loss(model)
            train(tower.to(device), tower_loss, batches, device)
            continue
        if stage.name in ("deep", "qwen-deep"):
            model = double(model, make).to(device)
            speed_up(model)
        if stage.name == "shapes":      # begun from the exported weights, which are bfloat16
            for p in model.parameters():
                p.data = p.data.bfloat16().float()
        train(model, loss, batches, device)
    return model


# ---- the models before training ------------------------------------------------------------------

def make_llava(layers: int, tokenizer) -> model_llava.Llava:
    """Use the last CLIP block (feature layer -1), so that no weight in the file is idle."""
    text = model_llava.TextConfig(
        vocab_size=rounded_up(tokenizer.get_vocab_size()), hidden_size=128, intermediate_size=344,
        num_hidden_layers=layers, num_attention_heads=4, rms_norm_eps=1e-5)
    vision = model_llava.VisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4,
        image_size=SIDE, patch_size=PATCH)
    config = model_llava.Config(
        text, vision, tokenizer.token_to_id("<image>"), vision_feature_layer=-1)
    model = model_llava.Llava(config, tokenizer, {tokenizer.token_to_id("</s>")})
    draw_weights(model, layers, "embed", 0.02)
    return model


def make_qwen(layers: int, tokenizer) -> model_qwen.Qwen:
    """Take patches of 7 pixels, so that a visual token is 14 wide, as LLaVA's. The rotary base is
    small because sequences are short."""
    text = model_qwen.TextConfig(
        vocab_size=rounded_up(tokenizer.get_vocab_size()), hidden_size=128, intermediate_size=352,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6,
        rope_theta=10.0, mrope_section=(4, 6, 6))
    vision = model_qwen.VisionConfig(
        depth=6, hidden_size=96, intermediate_size=256, num_heads=4, out_hidden_size=128,
        patch_size=PATCH // 2, window_size=4 * PATCH, fullatt_block_indexes=[2, 5])
    config = model_qwen.Config(
        text, vision, tokenizer.token_to_id("<|image_pad|>"), tie_word_embeddings=True,
        min_pixels=48 * PATCH ** 2, max_pixels=80 * PATCH ** 2)
    eos = {tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")}
    model = model_qwen.Qwen(config, tokenizer, eos)
    draw_weights(model, layers, "embed_tokens", text.hidden_size ** -0.5)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def rounded_up(size: int) -> int:
    return -(-size // 32) * 32


def draw_weights(model: nn.Module, layers: int, embeddings: str, std: float):
    """Draw random weights. std is that of the embeddings: all weights whose name holds that word.
    What each layer adds to the residual stream is smaller the more layers there are."""
    for name, p in model.named_parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=std if embeddings in name else p[0].numel() ** -0.5)
        if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight",
                          "attn.proj.weight")):
            p.data /= (2 * layers) ** 0.5


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="store_true", help="only the benchmarks")
    parser.add_argument("--only", choices=["llava", "qwen"], help="the benchmarks and one model")
    parser.add_argument("--seed", type=int, default=0, metavar="N",
                        help="of the training; models of another than 0 go to tiny/llava-N, qwen-N")
    args = parser.parse_args()
    ask.make_mme(HERE / "mme")
    ask.make_textvqa(HERE / "textvqa")
    if args.data:
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    suffix = f"-{args.seed}" if args.seed else ""
    if args.only != "qwen":
        llava = train_model(make_llava, 12, llava_tower, LLAVA_STAGES, VICUNA, device, args.seed)
        export_llava(llava, HERE / f"llava{suffix}")
    if args.only != "llava":
        qwen = train_model(make_qwen, 14, qwen_tower, QWEN_STAGES, CHATML, device, args.seed)
        export_qwen(qwen, HERE / f"qwen{suffix}")


if __name__ == "__main__":
    main()
