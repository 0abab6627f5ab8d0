"""run.json of a run: its starts and its epochs, also after a resume."""

import json

from timm_sape2 import provenance
from timm_sape2.training.record import add_to_record, begin_record, read_record


def test_record_of_a_run_that_was_resumed(tmp_path, monkeypatch):
    monkeypatch.delenv('LOCAL_WORLD_SIZE', raising=False)
    monkeypatch.setattr('sys.argv', ['/somewhere/train.py', '--data-dir', 'my photos'])
    begin_record(tmp_path, 0, processes=1, training_images=100)
    for epoch in (0, 1, 2):
        add_to_record(tmp_path, epoch, 96, training_seconds=9.96, validation_seconds=0.5)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    begin_record(tmp_path, 1, processes=2, training_images=100)
    add_to_record(tmp_path, 1, 96, training_seconds=5, validation_seconds=0.25)
    record = json.loads((tmp_path / 'run.json').read_text())
    first, second = record['starts']
    assert first['command'] == "python train.py --data-dir 'my photos'"
    assert second['command'] == "torchrun --nproc_per_node=2 train.py --data-dir 'my photos'"
    assert [(start['epoch'], start['processes']) for start in record['starts']] == [(0, 1), (1, 2)]
    assert first['versions'] == provenance.versions()
    assert first['commit'] == provenance.commit()
    assert first['training_images'] == 100
    assert first['started'] <= second['started'] <= record['epochs'][1]['finished']
    times = [
        (row['epoch'], row['images'], row['training_seconds'], row['validation_seconds']) for row in record['epochs']
    ]
    assert times == [(0, 96, 10.0, 0.5), (1, 96, 5, 0.25)]


def test_folder_without_a_record(tmp_path):
    assert read_record(tmp_path) == {'starts': [], 'epochs': []}
