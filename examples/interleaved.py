"""Images between the words of a question: each <image> is the next one.

    python examples/interleaved.py --images first.jpg second.jpg --model lmms-lab/llava-onevision-qwen2-7b-ov

Without arguments: the bundled model, which has been trained on videos alone, and two frames of the bundled video.
"""

import argparse

from PIL import Image

from llava.assets import tiny_model_path
from llava.conversation import conv_templates
from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.video import VideoConfig, load_video

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=str(tiny_model_path()))
parser.add_argument("--images", nargs="*")
parser.add_argument("--question", default="First <image>, then <image>. What color is the square?")
args = parser.parse_args()

tokenizer, model, image_processor, _ = load_pretrained_model(args.model, None, get_model_name_from_path(args.model))
demo = load_video(tiny_model_path().parent / "demo.mp4", VideoConfig(num_frames=2)).frames
images = [Image.open(path).convert("RGB") for path in args.images or []] or [Image.fromarray(frame) for frame in demo]
pixels = [item.to(model.device, model.dtype) for item in process_images(images, image_processor, model.config)]

conversation = conv_templates["qwen_1_5"].copy()
conversation.append_message(conversation.roles[0], args.question)
conversation.append_message(conversation.roles[1], None)
prompt = tokenizer_image_token(conversation.get_prompt(), tokenizer, return_tensors="pt").unsqueeze(0)

sizes = [image.size for image in images]
new_tokens = model.generate(
    prompt.to(model.device), images=pixels, image_sizes=sizes, do_sample=False, max_new_tokens=128
)
print(tokenizer.decode(new_tokens[0], skip_special_tokens=True))
