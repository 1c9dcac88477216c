import json
import sys

import pika

connection = pika.BlockingConnection(pika.URLParameters(sys.argv[1]))
channel = connection.channel()
channel.exchange_declare(exchange="payment", exchange_type="topic")
channel.queue_declare(queue="payment_order")
channel.queue_bind(exchange="payment", queue="payment_order", routing_key="payment_order")
reply_queue = sys.argv[2] if len(sys.argv) > 2 else channel.queue_declare(queue="", exclusive=True).method.queue


def on_reply(channel, method, properties, body):  # type: ignore[no-untyped-def]
    print(
        json.dumps(
            {"correlation_id": properties.correlation_id, "type": properties.content_type, "body": body.decode()}
        )
    )
    connection.close()


channel.basic_consume(queue=reply_queue, on_message_callback=on_reply, auto_ack=True)
channel.basic_publish(
    exchange="payment",
    routing_key="payment_order",
    body=json.dumps({"order_id": "123456", "amount": 100}),
    properties=pika.BasicProperties(reply_to=reply_queue, correlation_id="c-1"),
)
channel.start_consuming()
