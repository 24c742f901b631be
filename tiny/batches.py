"""From scenes to the tensors of a training step: pixels, and many questions packed behind an image.

    T rows of a training sequence    V visual tokens    B images of a batch
"""
import random
from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import model_llava
import model_qwen
from support.image import CLIP_MEAN, CLIP_STD, normalize, patchify
from support.benchmarks import SHORT
from tiny.questions import training_questions
from tiny.scenes import GLYPHS, SIDE, Scene, draw_scene
from tiny.vocabulary import COLORS, SHAPES, llava_tokenizer, qwen_tokenizer

PATCH = 14                  # pixels of a visual token's side, in both models
UNASKED = -100              # the target where nothing is to be said: cross_entropy leaves it out


@dataclass
class Stage:
    """A stage of the training: how long, how fast, on what images and which questions."""
    name: str
    steps: int
    decay: int              # the rate falls to 2 % within so many steps: a stage may end before
    rate: float             # the highest
    images: int             # of a batch
    sizes: list             # one is drawn for each batch
    asked: list | None      # besides what every word says; None: what lies on each visual token
    words_first: bool = True


class Batches(torch.utils.data.Dataset):
    """Batch i of a stage, the same whenever it is asked for: grid, pixels, and labels or rows."""

    def __init__(self, stage: Stage, chat: "Chat", seed: int = 0):
        self.name = f"{stage.name}-{seed}" if seed else stage.name  # seeds draws, names checkpoints
        self.stage = stage
        self.chat = chat
        self.tokenizer = chat.tokenizer()

    def __getitem__(self, i: int):
        stage = self.stage
        rng = random.Random(f"{self.name} {i}")
        size = rng.choice(stage.sizes) if len(stage.sizes) > 1 else stage.sizes[0]
        scenes = [draw_scene(rng, False, size) for _ in range(stage.images)]
        shown = [self.chat.show(scene.image) for scene in scenes]
        grid = shown[0][1]
        if stage.asked is None:
            rows = [(token_labels(scene),) for scene in scenes]
        else:
            rows = [self.pack(rng, scene, grid) for scene in scenes]
        pixels = torch.stack([pixels for pixels, _ in shown])
        return torch.tensor(grid), pixels, *(torch.tensor(column) for column in zip(*rows))

    def pack(self, rng: random.Random, scene: Scene, grid: tuple[int, int]) -> tuple:
        """Write one prompt up to the image, then as many questions with answers as there is room
        for. A question sees image, prompt and itself: the loss is that of questions asked alone.

        -> ids (T), positions (axes, T), block (T), targets (T). block: 0 for the shared beginning,
        the question's number, -1 for padding.
        """
        before, _, _ = self.encode("", "")      # what stands before the image, of any question
        ids = before + [self.tokenizer.token_to_id(self.chat.image)] * (grid[0] * grid[1])
        block = [0] * len(ids)
        targets = [UNASKED] * len(ids)
        pos, next_pos = self.chat.positions(len(before), grid, len(ids))
        asked = training_questions(rng, scene, self.stage.asked, self.stage.words_first)
        for number, (question, answer) in enumerate(asked, 1):
            if rng.random() >= 0.2:             # some without, so that the answer does not need it
                question += SHORT
            _, turn, to_say = self.encode(question, answer)
            if len(ids) + len(turn) > self.chat.rows:
                break
            ids += turn
            block += [number] * len(turn)
            targets += to_say
            turn_pos = torch.arange(next_pos, next_pos + len(turn))
            pos = torch.cat([pos, turn_pos.expand(len(pos), -1)], 1)
        room = self.chat.rows - len(ids)
        return (ids + [0] * room, F.pad(pos, (0, room)).tolist(), block + [-1] * room,
                targets + [UNASKED] * room)

    def encode(self, question: str, answer: str) -> tuple[list, list, list]:
        """Return the prompt's ids before the image, those after it with the answer, and the target
        of each of the latter. The token that ends the answer is only a target.
        """
        prompt = self.tokenizer.encode(self.chat.prompt.format(question=question)).ids
        place = prompt.index(self.tokenizer.token_to_id(self.chat.image))
        said = self.tokenizer.encode(answer, add_special_tokens=False).ids
        said.append(self.tokenizer.token_to_id(self.chat.end))
        turn = prompt[place + 1:] + said[:-1]
        return prompt[:place], turn, [UNASKED] * (len(turn) - len(said)) + said


# ---- what the two models want --------------------------------------------------------------------

@dataclass
class Chat:
    """How a model is shown an image and asked a question."""
    tokenizer: Callable         # () -> its tokenizer
    prompt: str
    image: str                  # its token in the prompt
    end: str                    # the token that ends an answer
    rows: int                   # of a training sequence: about 148 after the image
    positions: Callable         # (first row of the image, grid, T) -> (axes, T), and the next one
    show: Callable              # image -> pixels, grid


def show_llava(image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
    square = model_llava.pad_to_square(image).resize((SIDE, SIDE), Image.BICUBIC)
    return normalize(square, CLIP_MEAN, CLIP_STD), (SIDE // PATCH, SIDE // PATCH)


def show_qwen(image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
    """Show it at its own size, a multiple of PATCH. A token has 2 x 2 patches, of 2 frames."""
    return patchify(normalize(image, CLIP_MEAN, CLIP_STD), PATCH // 2, 2, 2)


def llava_positions(first: int, grid: tuple[int, int], T: int) -> tuple[Tensor, int]:
    return torch.arange(T)[None], T


def token_labels(scene: Scene) -> list[list[int]]:
    """Return what lies on the center of each visual token (V, 6): glyph, its place in the word,
    color, shape; counted from 1, 0 for none. Then the halves of the image that it lies in: upper or
    lower, left or right, 1 or 2. Only Qwen's tower is asked for these."""
    things = []
    for _, color, cells in scene.words:
        for place, (glyph, box) in enumerate(cells, 1):
            label = [1 + GLYPHS.index(glyph), place, 1 + COLORS.index(color), 0]
            things.append((box, label))
    for name, color, box in scene.shapes:
        things.append((box, [0, 0, 1 + COLORS.index(color), 1 + SHAPES.index(name)]))
    labels = []
    for x, y in token_centers(scene):
        label = [0, 0, 0, 0]
        for (a, b, c, d), thing in things:
            if a <= x <= c and b <= y <= d:
                label = thing
        lower = 2 if 2 * y > scene.image.height else 1
        right = 2 if 2 * x > scene.image.width else 1
        labels.append([*label, lower, right])
    return labels


def token_centers(scene: Scene) -> list[tuple[float, float]]:
    columns = range(scene.image.width // PATCH)
    rows = range(scene.image.height // PATCH)
    return [((column + 0.5) * PATCH, (row + 0.5) * PATCH) for row in rows for column in columns]


VICUNA = Chat(llava_tokenizer, model_llava.PROMPT, "<image>", "</s>", 212, llava_positions,
              show_llava)
CHATML = Chat(qwen_tokenizer, model_qwen.PROMPT, "<|image_pad|>", "<|im_end|>", 221,
              model_qwen.positions, show_qwen)
