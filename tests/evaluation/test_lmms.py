"The adapter for lmms-eval, with its base class where it is installed and a stand-in where it is not."
import abc, sys, types
import pytest, torch
from llava_made import picture, request, small_llava
lmms = pytest.importorskip('libmoe_nb.evaluation.lmms', exc_type=ImportError)

@pytest.fixture(scope='module')
def llava(): return small_llava()

@pytest.fixture
def lm(llava):
    lm = lmms.LmmsModel(llava, batch_size=3)
    lm.task_dict = dict(made=dict(test=[dict(image=picture(i)) for i in range(5)]))
    return lm

def see(doc): return [doc['image']]
QUESTIONS = ('what color is the text ?', 'is there a red circle ?', 'how many objects are there ?', 'what is the sum ?',
             'where is the dog ?')
def asked(**gen):
    return [request(q, dict(max_new_tokens=5) | gen, see, i, 'made', 'test') for i, q in enumerate(QUESTIONS)]

class Base(abc.ABC):
    "What lmms-eval's class demands"
    def __init__(self): self._rank, self._world_size, self.task_dict = 0, 1, {}
    for name in ('loglikelihood', 'generate_until', 'generate_until_multi_round'):
        locals()[name] = abc.abstractmethod(lambda self, requests: None)
    @classmethod
    def create_from_arg_string(cls, text, more=None):
        return cls(**dict(p.split('=') for p in text.split(',')), **(more or {}))

@pytest.fixture
def base(monkeypatch):
    try: from lmms_eval.api.model import lmms as there
    except ImportError:
        names = 'lmms_eval', 'lmms_eval.api', 'lmms_eval.api.model', 'lmms_eval.models', 'lmms_eval.models.registry_v2'
        made = {n: types.ModuleType(n) for n in names}
        made['lmms_eval.api.model'].lmms = there = Base
        made['lmms_eval.models.registry_v2'].ModelManifest = lambda model_id, **kw: (
            types.SimpleNamespace(model_id=model_id, **kw))
        for n, m in made.items(): monkeypatch.setitem(sys.modules, n, m)
    lmms.lmms_class.cache_clear()
    yield there
    lmms.lmms_class.cache_clear()

def test_the_manifest_leads_to_a_class_of_lmms_eval(base, llava, tmp_path):
    model, processor = llava
    m = lmms.model_manifest()
    module, name = m.simple_class_path.rsplit('.', 1)
    cls = getattr(sys.modules[module], name)
    assert m.model_id == 'libmoe' and issubclass(cls, base) and cls.is_simple
    model.save_pretrained(tmp_path); processor.save_pretrained(tmp_path)
    lm = cls.create_from_arg_string(f'pretrained={tmp_path}', dict(batch_size='2', device='cpu'))
    lm.task_dict = dict(made=dict(test=[dict(image=picture(i)) for i in range(5)]))
    assert lm.batch_size == 2 and lm._rank == 0
    again = lmms.LmmsModel(llava); again.task_dict = lm.task_dict
    assert lm.generate_until(asked()) == again.generate_until(asked())
    with pytest.raises(AttributeError, match='no attribute'): getattr(lmms, 'LibMoe')

def test_trap_padding_a_batch_answers_as_its_requests_alone(lm):
    together = lm.generate_until(asked())
    assert together == [lm.generate_until([r])[0] for r in asked()] and len(set(together)) > 1

def test_requests_with_other_arguments_keep_their_order(lm):
    a, b = asked(), asked(max_new_tokens=1)
    mixed = [x for pair in zip(a, b) for x in pair]
    one, two = lm.generate_until(a), lm.generate_until(b)
    assert lm.generate_until(mixed) == [x for pair in zip(one, two) for x in pair]
    assert all(len(s.split()) <= 1 for s in two)

def test_the_arguments_of_a_task_are_not_changed(lm):
    r = asked(until=['zz'], temperature=0, top_p=1.)
    lm.generate_until(r)
    assert r[0].args[1] == dict(max_new_tokens=5, until=['zz'], temperature=0, top_p=1.)

def test_the_image_is_seen(lm):
    r = [request(QUESTIONS[0], 'red', see, i, 'made', 'test') for i in range(5)]
    assert len({round(s, 5) for s, _ in lm.loglikelihood(r)}) == 5

@torch.no_grad()
def test_loglikelihood_by_hand(lm, llava):
    model, processor = llava
    text = '<s>USER: <image>\nwhat color is the text ? ASSISTANT: '
    x = processor.image_processor(images=[picture(2)], return_tensors='pt')['pixel_values']
    for answer in ('red', 'top left'):
        q, a = (processor.tokenizer(t, add_special_tokens=False).input_ids
                for t in (text.replace('<s>', '<s> ').replace('<image>', '<image> ' * 4), answer + ' </s>'))
        logp = model(input_ids=torch.tensor([q + a]), pixel_values=x).logits[0].log_softmax(-1)
        by_hand = sum(logp[len(q) + k - 1, i].item() for k, i in enumerate(a))
        r = request('what color is the text ?', answer, see, 2, 'made', 'test')
        assert lm.loglikelihood([r])[0][0] == pytest.approx(-by_hand, rel=1e-4)

def test_the_smallest_loss_is_the_best_choice_as_lmms_eval_takes_it(lm):
    said = lm.generate_until([request(QUESTIONS[1], dict(max_new_tokens=1), see, 1, 'made', 'test')])[0]
    choices = [said, *[w for w in ('red', 'yes', 'dog') if w != said]]
    scored = lm.loglikelihood([request(QUESTIONS[1], c, see, 1, 'made', 'test') for c in choices])
    by_token = [lm.loglikelihood([request(QUESTIONS[1], c, see, 1, 'made', 'test')])[0] for c in choices]
    assert ([s for s, _ in scored] == pytest.approx([s for s, _ in by_token], rel=1e-4)
            and not any(g for _, g in scored[1:]))
    mean = lmms.LmmsModel((lm.model, lm.processor), scores='mean_loss'); mean.task_dict = lm.task_dict
    r = [request(QUESTIONS[1], 'top left', see, 1, 'made', 'test')]
    assert mean.loglikelihood(r)[0][0] == pytest.approx(lm.loglikelihood(r)[0][0] / 3, rel=1e-5)

def test_an_exception_is_never_an_empty_answer(lm, monkeypatch):
    def broken(*args, **kwargs): raise torch.OutOfMemoryError('out of memory')
    monkeypatch.setattr(lm.model, 'generate', broken)
    with pytest.raises(Exception, match='out of memory'): lm.generate_until(asked())
    monkeypatch.setattr(lm.model, 'forward', broken)
    with pytest.raises(Exception, match='out of memory'):
        lm.loglikelihood([request('x ?', 'red', see, 0, 'made', 'test')])

@pytest.mark.parametrize('visual, context, says', [
    (lambda d: ['nowhere.png'], 'x ?', "made, document 3 cannot be asked: image 'nowhere.png' must be a file"),
    (lambda d: [dict(array=[0.], sampling_rate=16_000)], 'x ?', 'made, document 3 cannot be asked'),
    (see, '<image> <image> x ?', 'made, document 3 cannot be asked: 2 image marks for 1 images')])
def test_bad_documents_are_named(lm, visual, context, says):
    with pytest.raises(ValueError, match=says):
        lm.generate_until([*asked(), request(context, {}, visual, 3, 'made', 'test')])

def test_text_only_documents_and_marks_of_the_task(lm):
    bare = request('what is the sum ?', dict(max_new_tokens=3), lambda d: [], 0, 'made', 'test')
    marked = request('<image> ' + QUESTIONS[0], dict(max_new_tokens=5), see, 0, 'made', 'test')
    assert lm.generate_until([bare, *asked()])[1:] == lm.generate_until(asked())
    assert lm.generate_until([marked]) == lm.generate_until(asked())[:1]

def test_unknown_arguments_are_refused(llava):
    for kw, says in ((dict(pretrian='x'), 'model_args must be of'), (dict(scores='nll'), 'scores must be'),
                     (dict(batch_size=-1), 'batch_size must be')):
        with pytest.raises(ValueError, match=says): lmms.LmmsModel(llava, **kw)
