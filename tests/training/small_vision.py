"A small LLaVA, and conversations with no image, one and two."
from pathlib import Path

from PIL import Image
from libmoe_nb.data.conversations import ConversationData, Sample
from libmoe_nb.data.scenes import Scene, scene_words
from libmoe_nb.models.asking import image_tensor, small_processor
from libmoe_nb.models.towers import image_places
from libmoe_nb.models.vision import llava_from_scratch, upcycle_parts
from libmoe_nb.training.stages import Stage

ROOT = Path(__file__).resolve().parents[2]
PROCESSOR = small_processor(scene_words(), image_size=32, patch_size=8)
BUDGET = dict(sequence_length=128, batch_size=4, steps=3, learning_rate=5e-3, warmup_steps=1)
STAGE = Stage(name='vit', **BUDGET)

def make_model(recipe='dense', parts=('tower', 'projector'), seed=0):
    model = llava_from_scratch('tiny-vlm', PROCESSOR.tokenizer, seed=seed)
    return model if recipe == 'dense' else upcycle_parts(model, recipe, where=parts, num_experts=4, top_k=2, seed=seed)

def sample(i, images=1):
    "A scene described; with several images, of which the first is meant"
    scenes = [Scene.draw(i + 100 * k, 'train') for k in range(max(images, 1))]
    turns = (('user', '<image>\n' * images + 'describe the image .'), ('assistant', scenes[0].caption()))
    return Sample(f's{i}', turns, tuple(Image.fromarray(s.pixels(32)) for s in scenes[:images]))

def make_data(counts=(1,) * 12, model=None):
    places = image_places(model or make_model())
    return ConversationData([sample(i, n) for i, n in enumerate(counts)], PROCESSOR.tokenizer, image_tensor(PROCESSOR),
                            places, 128)

class Given:
    "A `ConversationData` whose batches are those that are given"
    def __init__(self, data, batches): self.data, self.given = data, batches
    def __getattr__(self, name): return getattr(self.data, name)
    def __len__(self): return len(self.data)
    def batches(self, batch_size, seed=0, start=0): return iter(self.given[start:])

def mixed_batch(data, rows):
    "One batch of samples of any modality"
    from libmoe_nb.data.conversations import collate
    from libmoe_nb.data.images import read_image
    items = [data.encoded[i] | dict(images=[data.image_tensor(read_image(f)) for f in data.samples[i].images])
             for i in rows]
    return collate(items, PROCESSOR.tokenizer.pad_token_id)

def fit(learn):
    with learn.no_bar(), learn.no_logging(): learn.fit_cosine()
    return learn
