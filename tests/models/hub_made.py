"Stands in for the Hugging Face hub"
import types
from pathlib import Path
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError

class Hub:
    "What was sent, and the card that is there"
    def __init__(self, card=None): self.card, self.calls = card, []
    def create_repo(self, api, repo_id, **kw):
        self.calls.append(('create', repo_id, kw))
        return types.SimpleNamespace(repo_id=f'me/{repo_id}')
    def upload_folder(self, api, *, folder_path, repo_id, ignore_patterns=None, **kw):
        self.files = {f.name: f.read_bytes() for f in Path(folder_path).iterdir()
                      if f.name not in (ignore_patterns or [])}
        self.calls.append(('upload', repo_id, kw))
    def load(self, repo_id, **kw):
        if self.card is None: raise EntryNotFoundError('no card')
        return ModelCard(self.card)

def hub_in_place(monkeypatch):
    "A `Hub` that huggingface_hub talks to"
    hub = Hub()
    monkeypatch.setattr('huggingface_hub.HfApi.create_repo', lambda api, *a, **k: hub.create_repo(api, *a, **k))
    monkeypatch.setattr('huggingface_hub.HfApi.upload_folder', lambda api, **k: hub.upload_folder(api, **k))
    monkeypatch.setattr('huggingface_hub.ModelCard.load', lambda *a, **k: hub.load(*a, **k))
    return hub
