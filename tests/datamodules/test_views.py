from otl.datamodules.layout import place
from otl.datamodules.views import centred, plain
from otl.types import Sample, Size


def test_the_plain_view_is_the_layouts_place(tmp_path):
    placed = place(Sample(tmp_path, Size(1080, 1920), [""]), Size(768, 1344))
    view = plain(placed)
    assert (view.bucket, view.scaled, view.crop) == (Size(768, 1344), Size(768, 1365), (0, 10))
    assert view == centred(Size(1080, 1920), Size(768, 1344))
