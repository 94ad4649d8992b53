// Prints the embeddings that transformers.js computes of some texts and an image:
//     node transformers_js.mjs FOLDER DTYPE IMAGE TEXTS_AS_JSON
// in a folder where @huggingface/transformers is installed.
import path from "node:path";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [folder, dtype, image, texts] = process.argv.slice(2);
const installed = createRequire(path.join(process.cwd(), "any.js"));
const library = pathToFileURL(installed.resolve("@huggingface/transformers"));
const { default: hf, ...named } = await import(library);
const {
  env, AutoTokenizer, AutoProcessor, RawImage,
  CLIPTextModelWithProjection, CLIPVisionModelWithProjection,
} = { ...hf, ...named };

env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder);
const name = path.basename(folder);
const tokenizer = await AutoTokenizer.from_pretrained(name);
const processor = await AutoProcessor.from_pretrained(name);
const textModel = await CLIPTextModelWithProjection.from_pretrained(name, { dtype });
const imageModel = await CLIPVisionModelWithProjection.from_pretrained(name, { dtype });
const tokens = tokenizer(JSON.parse(texts), { padding: true, truncation: true });
const { text_embeds } = await textModel(tokens);
const { image_embeds } = await imageModel(await processor(await RawImage.read(image)));
console.log(JSON.stringify({ texts: text_embeds.tolist(), images: image_embeds.tolist() }));
