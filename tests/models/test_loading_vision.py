"A LLaVA by its name alone: of one scale or two, dense or upcycled, as the model that was saved."
import json, pytest, torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BertConfig, Gemma3Config, LlavaConfig
from likeness import same_logits, same_weights
from libmoe_nb.models import loading
from libmoe_nb.models.loading import load_model, sees_images
from libmoe_nb.models.scales import ScaledLlavaConfig, ScaledLlavaForConditionalGeneration
from libmoe_nb.models.vision import VisionLanguageSize, llava_from_scratch, upcycle_parts

SMALL = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)


def llava(scales, source='enlarged'):
    return llava_from_scratch(VisionLanguageSize(
        name='small', tower=dict(model_type='siglip_vision_model', **SMALL), image_size=16, patch_size=8,
        text=dict(model_type='llama', vocab_size=40, **SMALL), image_scales=scales, scale_source=source), seed=0)


@pytest.mark.parametrize('scales', [(1,), (1, 2)])
@pytest.mark.parametrize('recipe', [None, 'smoe'])
def test_without_a_class(scales, recipe, tmp_path):
    model = llava(scales)
    if recipe: model = upcycle_parts(model, recipe, num_experts=3, top_k=2, seed=0)
    model.save_pretrained(tmp_path)
    again, tokenizer, run = load_model(tmp_path, tokenizer=False, device='cpu')
    assert (type(again), tokenizer, run) == (type(model), None, {}) and not again.training and sees_images(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    side = 16
    inputs = dict(pixel_values=torch.randn(1, 3, side, side), input_ids=torch.tensor([[1, *[39] * 4, 2]]))
    assert same_weights(model, again)
    with torch.no_grad(): assert same_logits(model(**inputs).logits, again(**inputs).logits)


def test_which_auto_class():
    "Of a configuration that several know, the one that the saved class belongs to; nothing changes for other models"
    pick = lambda config, *made_by: loading._auto_class(config(architectures=[*made_by]))
    assert pick(LlavaConfig, 'LlavaForConditionalGeneration') is AutoModelForImageTextToText
    assert pick(LlavaConfig) is AutoModelForImageTextToText
    assert pick(ScaledLlavaConfig, ScaledLlavaForConditionalGeneration.__name__) is AutoModelForImageTextToText
    assert pick(Gemma3Config, 'Gemma3ForConditionalGeneration') is AutoModelForImageTextToText
    assert pick(BertConfig, 'BertForMaskedLM') is AutoModelForCausalLM
    assert pick(BertConfig, 'BertLMHeadModel') is AutoModelForCausalLM


def test_what_sees_no_images(tmp_path):
    (tmp_path/'config.json').write_text(json.dumps(dict(model_type='llama')))
    assert not sees_images(tmp_path) and not sees_images(torch.nn.Linear(1, 1)) and sees_images(llava((1,)))
    with pytest.raises(ValueError, match='does not exist'): sees_images(tmp_path/'nowhere')
