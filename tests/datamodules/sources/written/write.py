"""Writes what lies beside it with the libraries that people use: datasets 5.2.0 and webdataset 1.0.2.

pip install datasets webdataset pillow && python write.py
"""

from pathlib import Path

from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pillow
from webdataset import ShardWriter

HERE = Path(__file__).parent
PICTURES = [Pillow.new("RGB", (width, 48), (shade, 0, 0)) for shade, width in ((10, 64), (20, 64), (30, 48))]
TEXTS = ["a red field", "a field, redder", "a small field"]

features = Features({"image": Image(), "text": Value("string"), "label": Value("int64")})
train = Dataset.from_dict({"image": PICTURES, "text": TEXTS, "label": [0, 1, 0]}, features=features)
train.save_to_disk(HERE / "saved", num_shards=2)
DatasetDict({"train": train, "test": train.select([0])}).save_to_disk(HERE / "splits")
(HERE / "hub").mkdir(exist_ok=True)
train.to_parquet(HERE / "hub" / "train-00000-of-00001.parquet")
(HERE / "webdataset").mkdir(exist_ok=True)
with ShardWriter(str(HERE / "webdataset" / "pictures-%06d.tar"), maxcount=2) as shards:
    for number, (picture, text) in enumerate(zip(PICTURES, TEXTS)):
        shards.write({"__key__": f"{number:06d}", "png": picture, "txt": text, "json": {"n": number}, "cls": number})
