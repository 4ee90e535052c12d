"A small LLaVA of random weights with its processor, questions about scenes, and requests as lmms-eval makes them."
import pytest, torch
from types import SimpleNamespace
from PIL import Image
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig
from libmoe_nb.data.scenes import Scene, scene_words

def small_llava(seed=0):
    asking = pytest.importorskip('libmoe_nb.models.asking')
    processor = asking.small_processor(scene_words(), 16, 8)
    tower = SiglipVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                               image_size=16, patch_size=8, vision_use_head=False)
    text = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                       vocab_size=len(processor.tokenizer), initializer_range=.3)
    torch.manual_seed(seed)
    config = LlavaConfig(vision_config=tower, text_config=text, vision_feature_layer=-1,
                         vision_feature_select_strategy='full',
                         image_token_id=processor.tokenizer.convert_tokens_to_ids('<image>'))
    return LlavaForConditionalGeneration(config).eval(), processor

def picture(seed): return Image.fromarray(Scene.draw(seed).pixels(16))

def request(*args): return SimpleNamespace(args=args)
