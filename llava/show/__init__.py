"""What a compression does to one video, to be looked at: the command `llava-scissor show`.

    write(look(qa, "clip.mp4", CompressionConfig(retention_ratio=0.1)), "folder")

`look` computes, `picture.py` draws, `page.py` and `files.py` write.
"""

from llava.show.files import write
from llava.show.look import Look, look

__all__ = ["Look", "look", "write"]
