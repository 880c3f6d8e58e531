"""A question about a video, answered from a share of its tokens.

python examples/video.py --video clip.mp4 --frames 32 --model lmms-lab/llava-onevision-qwen2-7b-ov
"""

import argparse

from llava.assets import tiny_model_path
from llava.conversation import conv_templates
from llava.mm_utils import get_model_name_from_path, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.token_compression import compression
from llava.video import VideoConfig, load_video

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=str(tiny_model_path()))
parser.add_argument("--video", default=str(tiny_model_path().parent / "demo.mp4"))
parser.add_argument("--frames", type=int, default=8)
parser.add_argument("--question", default="What color is the square?")
parser.add_argument("--retention-ratio", type=float, default=0.25)
args = parser.parse_args()

tokenizer, model, image_processor, _ = load_pretrained_model(args.model, None, get_model_name_from_path(args.model))
frames = load_video(args.video, VideoConfig(num_frames=args.frames)).frames  # (frames, height, width, 3) uint8
pixels = image_processor.preprocess(frames, return_tensors="pt")["pixel_values"].to(model.device, model.dtype)

conversation = conv_templates["qwen_1_5"].copy()
conversation.append_message(conversation.roles[0], f"<image>\n{args.question}")  # one <image> for the whole video
conversation.append_message(conversation.roles[1], None)
prompt = tokenizer_image_token(conversation.get_prompt(), tokenizer, return_tensors="pt").unsqueeze(0)

with compression(model, retention_ratio=args.retention_ratio):
    new_tokens = model.generate(
        prompt.to(model.device), images=[pixels], modalities=["video"], do_sample=False, max_new_tokens=128
    )
print(tokenizer.decode(new_tokens[0], skip_special_tokens=True))
