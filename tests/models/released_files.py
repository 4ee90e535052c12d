"Tiny random files in the layout that the paper's authors published, built by hand from its table"
import torch
from pathlib import Path
from safetensors.torch import save_file
from libmoe_nb.core.files import write_json
from libmoe_nb.data.scenes import scene_words
from libmoe_nb.models.asking import small_processor

N, D_V, H_V, D_T, LAYERS = 6, 8, 12, 24, 2
ROWS = dict(smoe=N, smoe_sigmoid=N, xmoe=N, smoe_share=N - 1, smoe_sharev3=N - 1, smoe_tcmoe=2*N + 3)

def made_by_hand(recipe, scales=2, seed=0):
    "Name of a tensor -> its random values"
    g, res = torch.Generator().manual_seed(seed), {}
    def put(name, *shape, plus=0.): res[name] = torch.randn(*shape, generator=g) * .3 + plus
    def linear(name, o, i, bias=True):
        put(f'{name}.weight', o, i)
        if bias: put(f'{name}.bias', o)
    def gates(home, n, zero):
        rows = N + 2*zero if recipe == 'smoe_plus_plus' else ROWS[recipe]
        put(f'{home}.gate.weight', rows, n)
        if recipe == 'xmoe':
            put(f'{home}.expert_embeddings', N, N // 2)
            put(f'{home}.inp_reduction.weight', N // 2, n)
        if recipe == 'smoe_plus_plus' and zero:
            put(f'{home}.gate_transform.weight', rows, rows)
            put(f'{home}.experts.{N + 1}.constant', n)
            put(f'{home}.experts.{N + 1}.wg.weight', 2, n)
    v = 'model.vision_tower.vision_model'
    put(f'{v}.embeddings.patch_embedding.weight', D_V, 3, 4, 4)
    put(f'{v}.embeddings.patch_embedding.bias', D_V)
    put(f'{v}.embeddings.position_embedding.weight', 4, D_V)
    for i in range(LAYERS):
        at = f'{v}.encoder.layers.{i}'
        for p in 'q_proj', 'k_proj', 'v_proj', 'out_proj': linear(f'{at}.self_attn.{p}', D_V, D_V)
        for n in 'layer_norm1', 'layer_norm2': put(f'{at}.{n}.weight', D_V, plus=1.); put(f'{at}.{n}.bias', D_V)
        for e in [None] if recipe == 'dense' else range(N):
            ffn = f'{at}.mlp' if e is None else f'{at}.moelayer.experts.{e}'
            linear(f'{ffn}.fc1', H_V, D_V); linear(f'{ffn}.fc2', D_V, H_V)
        if recipe != 'dense': gates(f'{at}.moelayer', D_V, True)
    for e in [None] if recipe == 'dense' else range(N):
        ffn = 'model.mm_projector' if e is None else f'model.mm_projector.moelayer.experts.{e}'
        linear(f'{ffn}.0', D_T, scales * D_V); linear(f'{ffn}.2', D_T, D_T)
    if recipe != 'dense': gates('model.mm_projector.moelayer', scales * D_V, False)
    put('model.embed_tokens.weight', 140, D_T); put('lm_head.weight', 140, D_T); put('model.norm.weight', D_T, plus=1.)
    for n, o, i in (('self_attn.qkv_proj', 3*D_T, D_T), ('self_attn.o_proj', D_T, D_T), ('mlp.gate_up_proj', 48, D_T),
                    ('mlp.down_proj', D_T, 24)): linear(f'model.layers.0.{n}', o, i, False)
    for n in 'input_layernorm', 'post_attention_layernorm': put(f'model.layers.0.{n}.weight', D_T, plus=1.)
    return res

def release(folder, recipe, tensors=None, kind='safetensors', files=1):
    "A folder as the authors publish them"
    (folder := Path(folder)/f'Phi3.5-Siglip-{recipe}-665K').mkdir(parents=True)
    tensors = made_by_hand(recipe) if tensors is None else tensors
    write_json(folder/'config.json', dict(
        model_type='llava_phi', hidden_size=D_T, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=140, max_position_embeddings=64, original_max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2))
    stem, save = (('model', save_file) if kind == 'safetensors' else ('pytorch_model', torch.save))
    names = list(tensors)
    parts = [names[i::files] for i in range(files)]
    home = {}
    for i, part in enumerate(parts):
        f = f'{stem}.{kind}' if files == 1 else f'{stem}-{i + 1:05d}-of-{files:05d}.{kind}'
        save({n: tensors[n] for n in part}, folder/f)
        home |= dict.fromkeys(part, f)
    if files > 1: write_json(folder/f'{stem}.{kind}.index.json', dict(metadata={}, weight_map=home))
    small_processor(scene_words(), 8, 4).tokenizer.save_pretrained(folder/'tokenizer')
    (folder/'vision_tower').mkdir()
    write_json(folder/'vision_tower'/'config.json', dict(
        model_type='siglip_vision_model', hidden_size=D_V, intermediate_size=H_V, num_hidden_layers=LAYERS,
        num_attention_heads=2, image_size=8, patch_size=4))
    return folder
