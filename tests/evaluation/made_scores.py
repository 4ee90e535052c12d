"Made-up scores for the tests of rankings."
import numpy as np, pandas as pd
from libmoe_nb.evaluation.scores import simulate_scores

def draw(accuracy, seeds=1, docs=60, tasks=2, **kw):
    "Scores [models, seeds, tasks, docs]"
    df = simulate_scores(accuracy, seeds=seeds, docs=docs, tasks=tasks, **kw)
    return df.value.to_numpy().reshape(len(accuracy), seeds, tasks, docs)

def frame(x, names='abcdefgh'):
    "Such scores as samples"
    at = np.indices(x.shape).reshape(4, -1)
    return pd.DataFrame(dict(model=[names[i] for i in at[0]], seed=at[1], task=[f't{i}' for i in at[2]], doc=at[3],
                             value=x.ravel()))

def simulate(*args, **kw): return frame(draw(*args, **kw))
