import json
import sys

import pika

connection = pika.BlockingConnection(pika.URLParameters(sys.argv[1]))
channel = connection.channel()
queue = channel.queue_declare(queue="", exclusive=True).method.queue
channel.queue_bind(exchange=sys.argv[2], queue=queue, routing_key="payment.*")


def on_event(channel, method, properties, body):  # type: ignore[no-untyped-def]
    message = {
        "key": method.routing_key,
        "type": properties.content_type,
        "headers": properties.headers,
        "body": body.decode(),
    }
    print(json.dumps(message), flush=True)


channel.basic_consume(queue=queue, on_message_callback=on_event, auto_ack=True)
print("listening", flush=True)
channel.start_consuming()
