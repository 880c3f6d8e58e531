"""A question about one image, in LLaVA-NeXT's names.

    python examples/image.py --image photo.jpg --model lmms-lab/llava-onevision-qwen2-7b-ov

Without arguments: the bundled model, which has been trained on videos alone, and a frame of the bundled video.
"""

import argparse
from pathlib import Path

from PIL import Image

from llava.assets import tiny_model_path
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.video import VideoConfig, load_video

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=str(tiny_model_path()))
parser.add_argument("--image", type=Path)
parser.add_argument("--question", default="What color is the square?")
args = parser.parse_args()

tokenizer, model, image_processor, _ = load_pretrained_model(args.model, None, get_model_name_from_path(args.model))
demo = load_video(tiny_model_path().parent / "demo.mp4", VideoConfig(num_frames=1)).frames[0]
image = Image.open(args.image).convert("RGB") if args.image else Image.fromarray(demo)
pixels = process_images([image], image_processor, model.config)
pixels = [item.to(model.device, model.dtype) for item in pixels]

conversation = conv_templates["qwen_1_5"].copy()
conversation.append_message(conversation.roles[0], f"{DEFAULT_IMAGE_TOKEN}\n{args.question}")
conversation.append_message(conversation.roles[1], None)
prompt = tokenizer_image_token(conversation.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")

new_tokens = model.generate(
    prompt.unsqueeze(0).to(model.device), images=pixels, image_sizes=[image.size], do_sample=False, max_new_tokens=128
)
print(tokenizer.decode(new_tokens[0], skip_special_tokens=True))
