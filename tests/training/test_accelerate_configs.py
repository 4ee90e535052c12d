"The configurations of accelerate in `tools/accelerate`: what a launcher makes of them, and what a learner does then."
import importlib.util, sys
from types import ModuleType, SimpleNamespace

import pytest, torch
from accelerate import DeepSpeedPlugin
from libmoe_nb.models.causal import from_scratch
from libmoe_nb.moe.config import recipes
from libmoe_nb.moe.layers import MoELayer
from libmoe_nb.training.learner import moe_learner
from libmoe_nb.training.distributed import *
from launch_settings import CONFIGS, told_by
from small_runs import SMALL

pytest_plugins = ['small_data']

def test_what_is_shipped():
    assert sorted(p.name for p in CONFIGS.glob('*.yaml')) == ['ddp.yaml', 'fsdp2.yaml', 'zero2.yaml', 'zero3.yaml']
    for p in CONFIGS.glob('*.yaml'): assert f'tools/accelerate/{p.name}' in p.read_text()

def test_a_launcher_understands_each():
    ddp, fsdp, two, three = (told_by(n) for n in ('ddp', 'fsdp2', 'zero2', 'zero3'))
    assert 'ACCELERATE_USE_FSDP' not in ddp and 'ACCELERATE_USE_DEEPSPEED' not in ddp
    assert fsdp['ACCELERATE_USE_FSDP'] == 'true' and fsdp['FSDP_VERSION'] == '2'
    assert fsdp['FSDP_CPU_RAM_EFFICIENT_LOADING'] == 'false'
    for env, stage in ((two, '2'), (three, '3')):
        assert env['ACCELERATE_USE_DEEPSPEED'] == 'true' and env['ACCELERATE_DEEPSPEED_ZERO_STAGE'] == stage
    assert three['ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES'] == 'MoELayer'

@pytest.mark.parametrize('recipe', sorted(set(recipes) - {'dense'}))
def test_the_leaves_of_zero3_are_the_layers(recipe, monkeypatch):
    "What accelerate would tell DeepSpeed, with a stand-in for it: every mixture layer is gathered as a whole"
    leaves = []
    fake = ModuleType('deepspeed.utils')
    fake.set_z3_leaf_modules = lambda model, classes: leaves.extend(
        m for m in model.modules() if isinstance(m, tuple(classes)))
    monkeypatch.setitem(sys.modules, 'deepspeed', ModuleType('deepspeed'))
    monkeypatch.setitem(sys.modules, 'deepspeed.utils', fake)
    monkeypatch.setattr('accelerate.utils.dataclasses.compare_versions', lambda *args: False)
    with torch.device('meta'): model = from_scratch(recipe, 'tiny', **SMALL)
    plugin = SimpleNamespace(transformer_moe_cls_names=told_by('zero3')['ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES'])
    DeepSpeedPlugin.set_moe_leaf_modules(plugin, model)
    assert [type(m) for m in leaves] == [MoELayer] * 2

@pytest.mark.parametrize('change, why', [
    (dict(kind='DEEPSPEED'), "distributed_type must be of DDP or FSDP, since others have a loop of their own: see "
                             "tools/accelerate, got 'DEEPSPEED'"),
    (dict(FSDP_VERSION='1'), "fsdp_version must be 2, got '1'"),
    (dict(FSDP_CPU_RAM_EFFICIENT_LOADING='true'), 'fsdp_cpu_ram_efficient_loading must be false, or all processes')])
def test_what_a_learner_cannot_do_is_refused_before_anything_is_cut(change, why, monkeypatch, data):
    import libmoe_nb.training.distributed as d
    for k, v in (told_by('fsdp2') | change).items(): monkeypatch.setenv(k, v)
    monkeypatch.setattr(d, 'world_size', lambda: 2)
    told = SimpleNamespace(distributed_type=SimpleNamespace(value=change.get('kind', 'MULTI_CPU')), device='cpu',
                           state=SimpleNamespace())
    monkeypatch.setattr('accelerate.Accelerator', lambda **kwargs: told)
    learn = moe_learner(from_scratch('smoe', 'tiny', **SMALL), data, preset='tiny', batch_size=4, steps=1, device='cpu')
    with pytest.raises(ValueError, match='must be') as e: learn.distribute(cpu=True)
    assert str(e.value).startswith(why), e.value

def test_the_script_for_deepspeed_trains_without_it(tmp_path, cache, monkeypatch):
    spec = importlib.util.spec_from_file_location('trainer_script', CONFIGS/'trainer.py')
    spec.loader.exec_module(script := importlib.util.module_from_spec(spec))
    monkeypatch.setenv('LIBMOE_CACHE', str(cache))
    loss = script.main(['smoe', '--preset', 'tiny', '--steps', '2', '--max-bytes', '100000', '--device', 'cpu', '--out',
                        str(tmp_path)])
    assert 1 < loss < 20 and (tmp_path/'model'/'model.safetensors').exists()
