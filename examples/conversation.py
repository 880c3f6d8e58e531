"""Several questions about one video; each answer appears as it is written and is part of the next prompt.

python examples/conversation.py clip.mp4 "What is happening?" "And then?" --model lmms-lab/llava-onevision-qwen2-7b-ov

The bundled model, which is the default, has been trained on single questions and is lost at the second one.
"""

import argparse

from transformers import TextStreamer

from llava.assets import tiny_model_path
from llava.conversation import conv_templates
from llava.mm_utils import get_model_name_from_path, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.token_compression import compression
from llava.video import VideoConfig, load_video

parser = argparse.ArgumentParser()
parser.add_argument("video", nargs="?", default=str(tiny_model_path().parent / "demo.mp4"))
parser.add_argument("questions", nargs="*", default=["What color is the square?", "What color is the triangle?"])
parser.add_argument("--model", default=str(tiny_model_path()))
args = parser.parse_args()

tokenizer, model, image_processor, _ = load_pretrained_model(args.model, None, get_model_name_from_path(args.model))
frames = load_video(args.video, VideoConfig(num_frames=8)).frames
pixels = image_processor.preprocess(frames, return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
streamer = TextStreamer(tokenizer, skip_special_tokens=True)

conversation = conv_templates["qwen_1_5"].copy()
for question in args.questions:
    conversation.append_message(conversation.roles[0], question if conversation.messages else f"<image>\n{question}")
    conversation.append_message(conversation.roles[1], None)
    prompt = tokenizer_image_token(conversation.get_prompt(), tokenizer, return_tensors="pt").unsqueeze(0)
    print(f"> {question}")
    with compression(model, retention_ratio=0.25):
        new_tokens = model.generate(
            prompt.to(model.device), images=[pixels], modalities=["video"], max_new_tokens=128, streamer=streamer
        )
    conversation.messages[-1][1] = tokenizer.decode(new_tokens[0], skip_special_tokens=True)
